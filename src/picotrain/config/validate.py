"""A tree of plain values -> a Config, or every problem it has, in words."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from picotrain import parts
from picotrain.config.groups import choices, of_another_kind
from picotrain.config.keys import leaves, nearest, owners, rule, sections, shown, unknown_key
from picotrain.config.schema import ROOMS, Config, EvaluationConfig, evaluation_of, kinds_of, part_of, schema_of, section_class
from picotrain.errors import ConfigError, Problem
from picotrain.section import Section

EMPTY: tuple[Any, ...] = (None, 0, (), [])  # what says nothing; False == 0


def validate(tree: dict[str, Any], doubtful: Collection[str] = ()) -> Config:
    """The config of a tree of sections; raises ConfigError with all its problems. doubtful: as in `explain`."""
    schema, problems = schema_for(tree)
    unknown = {problem.path.partition(".")[0] for problem in problems}  # without a kind nothing can be said of a section's keys
    tree, more = _fitted(tree, schema, unknown)
    problems += [problem for problem in more if problem.path.partition(".")[0] not in doubtful and "experiment" not in doubtful]
    try:
        config = schema.model_validate(tree)
    except ValidationError as error:
        found = [problem for problem in explain(error, schema, doubtful) if problem.path.partition(".")[0] not in unknown]
        raise ConfigError([*problems, *found]) from None
    if problems:
        raise ConfigError(problems)
    return config


def schema_for(tree: dict[str, Any]) -> tuple[type[Config], list[Problem]]:
    """The schema with the parts that a tree names, and what is wrong with their names. A part that is not there leaves its section as
    that of the built-in ones."""
    chosen, problems = {}, []
    for section, room in ROOMS.items():
        values = tree.get(section)
        kind = values.get("kind", room.default) if isinstance(values, dict) else room.default
        known = kinds_of(section)
        if kind in known:
            if not (found := _unusable(f"{section}.kind", part_of, section, kind)):
                chosen[section] = kind
            problems += found
        elif isinstance(values, dict):
            problems.append(_unknown_kind(section, kind, known))
    evaluation = tree.get("evaluation")
    wanted = []
    for name in evaluation if isinstance(evaluation, dict) else ():
        if name in parts.kinds("evaluations") and name not in EvaluationConfig.model_fields:
            if not (found := _unusable(f"evaluation.{name}", evaluation_of, name)):
                wanted.append(name)
            problems += found
    return schema_of(chosen, tuple(wanted)), problems


def _unusable(key: str, find: Callable[..., object], *named: str) -> list[Problem]:
    """What is wrong with a part that a key names."""
    try:
        find(*named)
    except ConfigError as error:
        return [Problem(key, f"{found.path} {found.message}", found.hint) for found in error.problems]
    return []


def _unknown_kind(section: str, kind: Any, known: list[str]) -> Problem:
    meant = nearest(kind, known, 1) if isinstance(kind, str) else []
    what = "is missing" if kind is None else f"must be one of {', '.join(known)}, not {shown(kind)}"
    return Problem(f"{section}.kind", what, f"did you mean {meant[0]}?" if meant else f"one of {', '.join(known)}" if kind is None else "")


def _fitted(tree: dict[str, Any], schema: type[Config], unknown: Collection[str]) -> tuple[dict[str, Any], list[Problem]]:
    """The tree without keys that only parts of other kinds have, as long as they say nothing: files of before name every key. And the
    problems of those that say something."""
    tree, problems = dict(tree), []
    for section, room in ROOMS.items():
        values, part = tree.get(section), section_class(schema, section)
        if section in unknown or not isinstance(values, dict):
            continue
        foreign = [name for name in values if isinstance(name, str) and name not in part.model_fields and owners(f"{section}.{name}")]
        kind = str(values.get("kind", room.default))
        hint = f"{section}={kind} instead of {section}.kind={kind} brings its own values" if kind in choices(section) else ""
        problems += [of_another_kind(f"{section}.{name}", kind, hint) for name in foreign if values[name] not in EMPTY]
        tree[section] = {name: value for name, value in values.items() if name not in foreign}
    return tree, problems


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy with some dotted keys set, validated as a whole."""
    tree = config.model_dump()
    for key, value in values.items():
        put(tree, key, value)
    return validate(tree)


def explain(error: ValidationError, schema: type[Config], doubtful: Collection[str] = ()) -> list[Problem]:
    """One problem for each key at fault. Contradictions within a `doubtful` section are left out:
    a word about it was refused before, so that what contradicts may not be what was meant."""
    problems: dict[str, Problem] = {}
    for found in error.errors():
        if found["type"] == "contradiction":
            section = str(found["loc"][0])
            if section not in doubtful and "experiment" not in doubtful:
                problems.update({problem.path: problem for problem in found.get("ctx", {})["problems"]})
        else:
            problem = _problem(found, schema)
            problems.setdefault(problem.path, problem)
    return list(problems.values())


def _problem(found: Any, schema: type[Config]) -> Problem:
    known = leaves(schema)
    key, value = _key(found["loc"], known), found["input"]
    inside = found["loc"][key.count(".") + 1 :]
    if key in known and (element := known[key].element) and len(inside) > 1:
        return _element_problem(key, element, inside, found)
    if found["type"] in ("extra_forbidden", "invalid_key"):
        return unknown_key(key, schema=schema)
    if key in sections(schema) or not key:
        return Problem(key or "config", f"must be a section with keys of its own, not {shown(value)}")
    if found["type"] == "missing":
        section = key.partition(".")[0]
        kind = section_class(schema, section).model_fields["kind"].default if section in ROOMS else None
        brought = f"; {section}={kind} brings one" if kind in choices(section) else ""
        return Problem(key, "is missing", f"must be {rule(key, schema=schema)}{brought}")
    words = known[key].words
    meant = nearest(value, words, 1) if isinstance(value, str) else []
    return Problem(key, f"must be {rule(key, value, schema)}, not {shown(value)}", f"did you mean {meant[0]}?" if meant else "")


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


def _key(loc: tuple[Any, ...], known: Collection[str]) -> str:
    """The dotted key of a place in a validation error: without positions in a list or branches of a union."""
    key = ""
    for part in map(str, loc):
        key = f"{key}.{part}" if key else part
        if key in known:
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
