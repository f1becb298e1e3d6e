"""A tree of plain values -> a Config, or every problem it has, in words."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from picotrain.config.keys import leaves, nearest, rule, sections, shown, unknown_key
from picotrain.config.schema import Config, Section
from picotrain.errors import ConfigError, Problem


def validate(tree: dict[str, Any]) -> Config:
    """The config of a tree of sections; raises ConfigError with all its problems."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy with some dotted keys set, validated as a whole."""
    tree = config.model_dump()
    for key, value in values.items():
        put(tree, key, value)
    return validate(tree)


def explain(error: ValidationError, doubtful: Collection[str] = ()) -> list[Problem]:
    """One problem for each key at fault. Contradictions within a `doubtful` section are left out:
    a word about it was refused before, so that what contradicts may not be what was meant."""
    problems: dict[str, Problem] = {}
    for found in error.errors():
        if found["type"] == "contradiction":
            section = str(found["loc"][0])
            if section not in doubtful and "experiment" not in doubtful:
                problems.update({problem.path: problem for problem in found.get("ctx", {})["problems"]})
        else:
            problem = _problem(found)
            problems.setdefault(problem.path, problem)
    return list(problems.values())


def _problem(found: Any) -> Problem:
    key, value = _key(found["loc"]), found["input"]
    inside = found["loc"][key.count(".") + 1 :]
    if key in leaves() and (element := leaves()[key].element) and len(inside) > 1:
        return _element_problem(key, element, inside, found)
    if found["type"] in ("extra_forbidden", "invalid_key"):
        return unknown_key(key)
    if key in sections() or not key:
        return Problem(key or "config", f"must be a section with keys of its own, not {shown(value)}")
    if found["type"] == "missing":
        return Problem(key, "is missing", f"must be {rule(key)}")
    words = leaves()[key].words
    meant = nearest(value, words, 1) if isinstance(value, str) else []
    return Problem(key, f"must be {rule(key, value)}, not {shown(value)}", f"did you mean {meant[0]}?" if meant else "")


def _element_problem(key: str, element: type[Section], inside: tuple[Any, ...], found: Any) -> Problem:
    """What is wrong within one section of a list of sections."""
    name = str(inside[1])
    path = f"{key}[{inside[0]}].{name}"
    if found["type"] == "extra_forbidden":
        meant = nearest(name, element.model_fields, 1)
        return Problem(path, "there is no such key", f"did you mean {meant[0]}?" if meant else f"it has {', '.join(element.model_fields)}")
    if found["type"] == "missing":
        return Problem(path, "is missing", f"each has {', '.join(element.model_fields)}")
    return Problem(path, f"{found['msg'][0].lower()}{found['msg'][1:]}, not {shown(found['input'])}")


def _key(loc: tuple[Any, ...]) -> str:
    """The dotted key of a place in a validation error: without positions in a list or branches of a union."""
    key = ""
    for part in map(str, loc):
        key = f"{key}.{part}" if key else part
        if key in leaves():
            break
    return key


def strings(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a tree with its dotted key."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from strings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for value in tree:
            yield from strings(value, key)
    elif isinstance(tree, str):
        yield key, tree


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; a section that is none (a mistake in YAML) is left for the schema to refuse."""
    *path, last = key.split(".")
    for name in path:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            return
    tree[last] = value
