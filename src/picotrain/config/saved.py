"""Configs as plain YAML: writing one, and reading it back without trusting it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from picotrain.config.overrides import interpolation
from picotrain.config.schema import SCHEMA_VERSION, Config
from picotrain.config.validate import strings, validate
from picotrain.disk import read_plain
from picotrain.errors import ConfigError, Problem

MAX_CONFIG_BYTES = 1 << 20
MAX_KEYS = 1000  # of a section; each that is wrong is compared with all that there are


class _PlainLoader(yaml.SafeLoader):
    """YAML without tags that build objects, without aliases, without keys that are there twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "an alias (*name) is not plain YAML", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if len(node.value) > MAX_KEYS:
            raise ConstructorError(None, None, f"a section of {len(node.value):,} keys", node.start_mark)
        seen: set[str] = set()
        for key, _ in node.value:
            if repr(key.value) in seen:
                raise ConstructorError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
            seen.add(repr(key.value))
        return super().construct_mapping(node, deep)


def dump(config: Config, encoding: str = "utf-8") -> str:
    """The config as YAML that `encoding` can hold, keys in the schema's order; `load` gives back an equal config."""
    tree = config.model_dump(mode="json")
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)
    # PyYAML writes these line breaks as they are and reads them as blanks.
    if any(mark in text for mark in "\x85\u2028\u2029") or text.encode(encoding, errors="ignore").decode(encoding) != text:
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=False, width=120)
    return text


def load(path: Path) -> Config:
    """The config in a file that `dump` wrote; raises ConfigError for anything else."""
    return validate(read(path))


def read(path: Path) -> dict[str, Any]:
    """The tree in a saved config: plain YAML of this schema version, without interpolation. Runs no code."""
    try:
        tree = parse_yaml(read_plain(path, MAX_CONFIG_BYTES).decode("utf-8"))
    except FileNotFoundError:
        raise _refuse(path, "there is no such file") from None
    except IsADirectoryError:
        raise _refuse(path, "is a folder", f"its config is {path / 'config.yaml'}" if (path / "config.yaml").is_file() else "") from None
    except OSError as error:
        raise _refuse(path, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _refuse(path, "is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise _refuse(path, f"is not plain YAML: {yaml_reason(error)}", "a saved config holds data only; nothing in it is run") from None
    except ValueError:  # a number with thousands of digits, an impossible date, brackets without end
        raise _refuse(path, "holds a value that YAML cannot read") from None
    if not isinstance(tree, dict):
        raise _refuse(path, "holds no keys", "expected the config.yaml of a run")
    version = tree.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise ConfigError(
            [Problem("schema_version", f"must be {SCHEMA_VERSION}, not {version!r}", f"{path} was not written by this version")]
        )
    if problems := [interpolation(key, text) for key, text in strings(tree) if "${" in text]:
        raise ConfigError(problems)
    return tree


def parse_yaml(text: str) -> Any:
    """Plain YAML as plain values. Raises YAMLError, or ValueError for a value that cannot be; runs no code, follows no alias."""
    try:
        return yaml.load(text, Loader=_PlainLoader)  # a SafeLoader
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(path: Path, message: str, hint: str = "") -> ConfigError:
    return ConfigError([Problem(str(path), message, hint)])


def yaml_reason(error: yaml.YAMLError) -> str:
    """What a YAML error says, in one line, with the line it is about."""
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}: {reason}" if mark else reason
