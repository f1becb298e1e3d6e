"""The command line's `group=choice` and `key=value` words, read without Hydra's grammar: text stays as it was typed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from picotrain import parts
from picotrain.config.elsewhere import NOTHING, exact
from picotrain.config.groups import GROUPS, choices, of_another_kind, unknown_choice
from picotrain.config.keys import Leaf, leaves, nearest, owners, shown, unknown_key
from picotrain.config.schema import HORIZONS, ROOMS, Config, section_class, two_horizons
from picotrain.errors import Problem

NO_WORD = 1 << 30  # what is wrong with no single word comes last
_SWEEP = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)")
_INT = re.compile(r"[+-]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[+-]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)


@dataclass
class Overrides:
    """What the words of a command line ask for, and what is wrong with them."""

    groups: dict[str, str] = field(default_factory=dict)
    texts: dict[str, tuple[int, str]] = field(default_factory=dict)  # which word, and its value as typed; the last of a repeated key
    values: dict[str, Any] = field(default_factory=dict)  # filled by `read`
    doubtful: set[str] = field(default_factory=set)  # sections of which a word was refused
    _found: list[tuple[int, Problem]] = field(default_factory=list)

    @property
    def problems(self) -> list[Problem]:
        """In the order of the words, then those of no word."""
        return [problem for _, problem in sorted(self._found, key=lambda found: found[0])]

    def refuse(self, problem: Problem, section: str = "", word: int = NO_WORD) -> None:
        self._found.append((word, problem))
        self.doubtful.add(section)

    def read(self, schema: type[Config] | None = None) -> Overrides:
        """Read the values as the keys of this schema want them. None: as those of any part, where it is not known yet which are named."""
        groups = {section: room.group for section, room in ROOMS.items()} | {"evaluation": "evaluations"}
        for key, (word, text) in self.texts.items():
            section = key.partition(".")[0]
            if leaf := leaves(schema).get(key):
                parsed = parse_value(leaf, text)
                if isinstance(parsed, Problem):
                    self.refuse(parsed, section, word)
                else:
                    self.values[key] = parsed
            elif schema and owners(key):
                if isinstance(kind := _kind(schema, section), str):
                    self.refuse(of_another_kind(key, kind), section, word)
            elif schema is None and section in groups and parts.installed(groups[section]):
                pass  # it may be a package's
            elif schema and section == "evaluation" and _lacks_part(schema, key):
                self.values[key] = text  # what is wrong with that part is said by `validate`
            elif words := NOTHING.get(key):
                self.refuse(Problem(key, words), section, word)
            elif "." not in key and (words := exact(key, text)):
                self.refuse(Problem(key, "there is no such key", f"did you mean {words}?"), section, word)
            else:
                self.refuse(unknown_key(key, GROUPS, schema), section, word)
        horizons = [f"train.{key}" for key in HORIZONS if self.values.get(f"train.{key}") is not None]
        if len(horizons) > 1:
            self.refuse(two_horizons(horizons), "train")
        return self


def _lacks_part(schema: type[Config], key: str) -> bool:
    """Whether a key is of an evaluation that is installed and that this schema could not take."""
    name = key.split(".")[1]
    return name in parts.installed("evaluations") and name not in section_class(schema, "evaluation").model_fields


def _kind(schema: type[Config], section: str) -> Any:
    """The kind that a schema is for; of a section whose kind is not known, no text."""
    return section_class(schema, section).model_fields["kind"].default


def parse(words: Sequence[str], config_dir: Path | None = None) -> Overrides:
    """Sort the words into group choices and texts by key."""
    result = Overrides()
    for number, word in enumerate(words):
        key, equals, value = word.partition("=")
        if refused := _refused(word, key, equals):
            result.refuse(refused, key.lstrip("~+").partition(".")[0], number)
            continue
        key = key.lstrip("+")  # Hydra's +key=value adds a key; every key is there, so it only sets it
        if key in GROUPS:
            _parse_choice(key, value, config_dir, result, number)
        else:
            result.texts.pop(key, None)
            result.texts[key] = number, value
    return result


def _refused(word: str, key: str, equals: str) -> Problem | None:
    """Words that are no `key=value`, whatever the key."""
    name = key.lstrip("~+")
    if name == "hydra" or name.startswith(("hydra.", "hydra/")):
        return Problem(name, "settings of Hydra would do nothing here", "the run directory is run.dir, console lines are logger.*")
    if key.startswith("~"):
        return Problem(name, "a key cannot be deleted", f"every key has a value; null is the nearest to none: {name}=null")
    if not equals:
        meant = nearest(name, [*GROUPS, *leaves()], 1)
        return Problem(
            word, "is no override", f"write key=value{f', e.g. {meant[0]}=...' if meant else ', e.g. model=d4 or train.max_steps=100'}"
        )
    if not name:
        return Problem(word, "has no key before the =", "write key=value, e.g. train.max_steps=100")
    return None


def _parse_choice(group: str, choice: str, config_dir: Path | None, result: Overrides, word: int) -> None:
    if _is_sweep(choice):
        result.refuse(_sweep(group, choice), group, word)
    elif group == "experiment" and choice == "null":
        result.groups.pop(group, None)  # no preset is the default
    elif choice in choices(group, config_dir):
        result.groups[group] = choice
    else:
        result.refuse(unknown_choice(group, choice, config_dir), group, word)


# Values ---------------------------------------------------------------------------------------------------


def parse_value(leaf: Leaf, value: str) -> Any:
    """The value a word gives to a key, for the schema to judge; a Problem if it can be none.

    Text is everything after the first `=`, as typed; only the exact word null is None. Other values are read as
    null, true, false, a number or a bare word; a list as [a, b], its elements quoted where they hold a comma.
    """
    if "${" in value:
        return interpolation(leaf.key, value)
    if leaf.is_text:
        return None if value == "null" else value
    if leaf.is_list:
        return _parse_list(leaf, value)
    if _is_sweep(value):
        return _sweep(leaf.key, value)
    if value == "":
        return Problem(leaf.key, "has no value after the =", f"{leaf.key}=null for none" if "null" in leaf.words else "")
    return parse_scalar(value)


def parse_scalar(text: str) -> Any:
    """None, a boolean, a number or the text itself."""
    constants = {"null": None, "true": True, "false": False}
    if text.lower() in constants:
        return constants[text.lower()]
    if _INT.fullmatch(text):
        return _number(int, text)
    return _number(float, text) if _FLOAT.fullmatch(text) else text


def _number(kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:  # thousands of digits, 1__0
        return text


def _parse_list(leaf: Leaf, value: str) -> Any:
    """`[a, b]`, or one element as it was typed."""
    if leaf.element and not value.startswith("["):
        return _parse_sections(leaf, value)
    if not value.startswith("["):
        return _sweep(leaf.key, value) if not leaf.is_text_list and _is_sweep(value) else [value]
    if leaf.element:
        return _parse_sections(leaf, value)
    hint = f"""{leaf.key}='["one", "two"]', with quotes around each element that is more than a word"""
    try:
        elements = yaml.load(value, Loader=yaml.BaseLoader)  # yields nothing but text
    except (yaml.YAMLError, RecursionError):
        return Problem(leaf.key, f"is not a list: {shown(value)}", hint)
    if not isinstance(elements, list) or not all(isinstance(element, str) for element in elements):
        return Problem(leaf.key, f"is not a list of texts: {shown(value)}", hint)
    return elements


def _parse_sections(leaf: Leaf, value: str) -> Any:
    """`[{key: value, ...}, ...]`; what the keys may hold is the schema's to judge."""
    assert leaf.element
    hint = f"{leaf.key}='[{{{next(iter(leaf.element.model_fields))}: ...}}, ...]', with quotes around the whole"
    try:
        elements = yaml.load(value, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        elements = None
    if not isinstance(elements, list) or not all(isinstance(element, dict) for element in elements):
        return Problem(leaf.key, f"is not a list of sections: {shown(value)}", hint)
    return [{key: parse_scalar(text) if isinstance(text, str) else text for key, text in element.items()} for element in elements]


def _is_sweep(value: str) -> bool:
    return "," in value or bool(_SWEEP.fullmatch(value))


def _sweep(key: str, value: str) -> Problem:
    leaf = leaves().get(key)
    if leaf and leaf.is_list:
        return Problem(key, f"takes a list, and {shown(value)} is none", f"{key}=[{value}]")
    first = value.partition(",")[0].partition("(")[2] or value.partition(",")[0]
    return Problem(key, f"takes one value, and {shown(value)} looks like a sweep", f"start one run for each, the first with {key}={first}")


def interpolation(key: str, value: str) -> Problem:
    """The problem of a value that points elsewhere instead of being one."""
    if "env" in value:
        return Problem(key, f"values are never taken from the environment: {shown(value)}", "config.yaml would keep them, secrets too")
    return Problem(key, f"is an interpolation: {shown(value)}", "write the value itself")
