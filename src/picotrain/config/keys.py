"""What keys a config has, what each may hold in words, and which known name an unknown one resembles.

Which keys there are depends on the parts that a config names. `schema` is its class; None: all keys of all built-in parts.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from picotrain import parts
from picotrain.config.schema import DATA_KINDS, ROOMS, Config, part_of, schema_of
from picotrain.errors import Problem
from picotrain.section import NO_NUL, Section


@dataclass(frozen=True)
class Leaf:
    """One key that holds a value."""

    key: str  # dotted
    kinds: tuple[type, ...]  # the types it may hold, None's and that of its words aside
    words: tuple[str, ...]  # the fixed words it may hold, as they are typed: "auto", "true", "null"
    element: type[Section] | None = None  # what a list of sections holds

    @property
    def is_text(self) -> bool:
        """Free text: taken literally from the command line."""
        return self.kinds == (str,)

    @property
    def is_list(self) -> bool:
        return self.kinds == (tuple,)

    @property
    def is_text_list(self) -> bool:
        return self.is_list and not self.words and self.element is None


@cache
def leaves(schema: type[Config] | None = None) -> dict[str, Leaf]:
    """Every key that holds a value, in the schema's order."""
    return {key: _leaf(key, annotation) for key, annotation in _fields(schema or Config, "", schema is None) if not _is_section(annotation)}


@cache
def sections(schema: type[Config] | None = None) -> tuple[str, ...]:
    """Every key that holds further keys, in the schema's order."""
    return tuple(key for key, annotation in _fields(schema or Config, "", schema is None) if _is_section(annotation))


def _fields(section: type[Section], prefix: str, all_kinds: bool) -> Iterable[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        annotation: Any = field.annotation
        yield prefix + name, annotation
        if all_kinds and section is Config and name in ROOMS:
            found: dict[str, Any] = {}
            for kind in DATA_KINDS[:1] if name == "data" else parts.built_in(ROOMS[name].group):
                found = dict(_fields(part_of(name, kind), f"{name}.", True)) | found
            yield from found.items()
        elif _is_section(annotation):
            yield from _fields(annotation, f"{prefix}{name}.", all_kinds)


def owners(key: str) -> list[str]:
    """The kinds of a section's built-in parts that have a key, e.g. ["muon"] of optimizer.momentum."""
    section, _, name = key.partition(".")
    if section not in ROOMS or section == "data":
        return []
    return [kind for kind in parts.built_in(ROOMS[section].group) if name in part_of(section, kind).model_fields]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _leaf(key: str, annotation: Any) -> Leaf:
    kinds: list[type] = []
    words: list[str] = []
    element: type[Section] | None = None

    def visit(part: Any) -> None:
        nonlocal element
        origin = get_origin(part)
        if origin is Annotated:
            visit(get_args(part)[0])
        elif origin in (Union, types.UnionType):
            for choice in get_args(part):
                visit(choice)
        elif origin is Literal:
            words.extend(map(str, get_args(part)))
        elif part is bool:
            words.extend(("true", "false"))
        elif part is type(None):
            words.append("null")
        elif origin is tuple:
            kinds.append(tuple)
            inner = get_args(part)[0]
            if get_origin(inner) is Literal:
                visit(inner)
            element = inner if _is_section(inner) else None
        else:
            kinds.append(part)

    visit(annotation)
    return Leaf(key, tuple(kinds), tuple(words), element)


# The rule of a key, in words ------------------------------------------------------------------------------


def rule(key: str, value: Any = None, schema: type[Config] | None = None) -> str:
    """What the key may hold, e.g. "a whole number of at least 8, or null". An upper bound that nobody meets by accident is named to
    the `value` that is above it only."""
    tree = _json_schema(schema or schema_of({key.partition(".")[0]: owner for owner in owners(key)[:1]}))
    node: dict[str, Any] = tree
    for name in key.split("."):
        node = node["properties"][name]
        if "$ref" in node:
            node = tree["$defs"][node["$ref"].rpartition("/")[2]]
    return ", or ".join(_words(choice, tree, value) for choice in node.get("anyOf", [node]))


@cache
def _json_schema(schema: type[Config]) -> dict[str, Any]:
    return schema.model_json_schema()


def _words(node: dict[str, Any], tree: dict[str, Any], value: Any = None) -> str:
    """One branch of a JSON schema, in words."""
    if "enum" in node:
        return "one of " + ", ".join(map(str, node["enum"]))
    if "const" in node:
        return str(node["const"])
    match node["type"]:
        case "integer":
            return ("an even number" if node.get("multipleOf") == 2 else "a whole number") + _bounds(node, value)
        case "number":
            return "a number" + _bounds(node, value)
        case "string":
            return f"text that matches {node['pattern']}" if node.get("pattern", NO_NUL) != NO_NUL else "text"
        case "array" if "$ref" in node["items"]:
            fields = tree["$defs"][node["items"]["$ref"].rpartition("/")[2]]["properties"]
            return f"a list of sections with {', '.join(fields)}"
        case "array":
            inner = _words(node["items"], tree)
            return "a list of texts" if inner == "text" else f"a list, each {inner}"
        case "boolean":
            return "true or false"
        case other:
            return other


def _bounds(node: dict[str, Any], value: Any) -> str:
    names = {"exclusiveMinimum": "above", "minimum": "of at least", "exclusiveMaximum": "below", "maximum": "of at most"}
    found = {word: node[name] for name, word in names.items() if name in node and _worth_saying(node[name], value)}
    bounds = [f"{word} {bound:,.0f}" if bound == int(bound) < 1e16 else f"{word} {bound:g}" for word, bound in found.items()]
    return " " + " and ".join(bounds) if bounds else ""


def _worth_saying(bound: float, value: Any) -> bool:
    return abs(bound) < 1000 or (isinstance(value, int | float) and abs(value) >= abs(bound))


# Names that resemble one another --------------------------------------------------------------------------


def nearest(name: str, options: Iterable[str], count: int = 3) -> list[str]:
    """The options most like `name`, the best first: by number for names such as d5, else by letters."""
    options = list(options)
    prefix, number = _split_number(name.lower())
    if number is not None:
        numbered = [(abs(n - number), n, option) for option in options for p, n in [_split_number(option)] if n is not None and p == prefix]
        if numbered:
            return [option for _, _, option in sorted(sorted(numbered)[:2], key=lambda item: item[1])]
    by_lower = {option.lower(): option for option in options}
    found = difflib.get_close_matches(name.lower(), by_lower, count) or [low for low in by_lower if len(name) > 1 and name.lower() in low]
    return [by_lower[low] for low in found[:count]]


def _split_number(name: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"([a-z_]+)(\d{1,9})", name)
    return (match[1], int(match[2])) if match else (name, None)


def unknown_key(key: str, groups: Iterable[str] = (), schema: type[Config] | None = None) -> Problem:
    """The problem of a key that does not exist, with the key (or config group) that was probably meant."""
    section = key.rpartition(".")[0]
    known, all_sections = leaves(schema), sections(schema)
    inside = [leaf for leaf in known if leaf.startswith(f"{key}." if key in all_sections else f"{section}.")]
    if key in all_sections:
        return Problem(key, "is a section and takes no value of its own", f"set one of its keys: {', '.join(inside)}")
    if package := {"experiment": "_global_", "cadence": "train"}.get(key):
        return Problem(key, "is a group and no section", f"a file in {key}/ begins with the line '# @package {package}'")
    if meant := _meant(key, groups, known, all_sections):
        return Problem(key, "there is no such key", f"did you mean {' or '.join(meant)}?")
    return Problem(key, "there is no such key", f"{section} has {', '.join(inside)}" if inside else f"sections: {', '.join(all_sections)}")


def _meant(key: str, groups: Iterable[str], known: Iterable[str], all_sections: Sequence[str]) -> list[str]:
    section, _, last = key.rpartition(".")
    by_last = {leaf.rpartition(".")[2]: leaf for leaf in known}
    here = {name: leaf for leaf in known for start, _, name in [leaf.rpartition(".")] if start == section}
    if close := nearest(last, here):
        return [here[name] for name in close]
    if exact := [leaf for leaf in known if leaf.rpartition(".")[2] == last]:
        return exact
    if section in all_sections:
        return []  # its keys are listed instead
    return nearest(key, [*all_sections, *groups]) or [by_last[name] for name in nearest(last, by_last)]


def shown(value: Any) -> str:
    """A value as a message shows it: YAML's words for None and booleans, text in quotes, nothing long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
