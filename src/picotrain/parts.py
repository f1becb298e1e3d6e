"""Finding parts by their kind: a built-in one is a module of that name in the group's folder, another package's is an entry point.

    src/picotrain/optimizers/lion.py                     optimizer.kind=lion, built in

    [project.entry-points."picotrain.optimizers"]        optimizer.kind=lion, from another package
    lion = "picotrain_lion:Lion"

A part is imported when a config names it, and not before. What a class has to offer stands in `picotrain.contracts`.
"""

from __future__ import annotations

import inspect
import pkgutil
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from picotrain.errors import ConfigError, Problem

CONF = "picotrain.conf"  # entry points that name packages whose folder conf/ has more choices for the config groups


@cache
def built_in(group: str) -> tuple[str, ...]:
    """The kinds of a group that come with picotrain, in the order of their names."""
    folder = Path(__file__).with_name(group)
    return tuple(sorted(module.name for module in pkgutil.iter_modules([str(folder)]) if not module.name.startswith("_")))


@cache
def _entries() -> Any:
    """All entry points there are, of another type on Python 3.11. To look through what is installed takes time: it is done once."""
    return entry_points()


@cache
def installed(group: str) -> dict[str, EntryPoint]:
    """The kinds that other packages add to a group."""
    return {entry.name: entry for entry in _entries().select(group=f"picotrain.{group}") if entry.name not in built_in(group)}


def kinds(group: str) -> list[str]:
    """All kinds of a group, the built-in ones first."""
    return [*built_in(group), *installed(group)]


@cache
def find(group: str, kind: str, contract: type) -> type[Any]:
    """The class of a part, which is to offer what `contract` does. Raises ConfigError for a package's part that cannot be used, KeyError
    for a kind that does not exist."""
    if kind in built_in(group):
        module = import_module(f"picotrain.{group}.{kind}")
        return next(value for value in vars(module).values() if _is_part(value, contract) and value.__module__ == module.__name__)
    entry = installed(group)[kind]
    where = f"{group} of the package {entry.dist.name if entry.dist else entry.value}"
    try:
        part = entry.load()
    except Exception as error:  # another package's code
        raise ConfigError(
            [Problem(kind, f"is among the {where}, and cannot be imported: {error}", "mend or remove that package")]
        ) from error
    if not _is_part(part, contract):
        rule = f"is among the {where}, and {entry.value} is no {contract.__name__}"
        raise ConfigError([Problem(kind, rule, f"a subclass of picotrain.contracts.{contract.__name__}")])
    return part


def _is_part(value: Any, contract: type) -> bool:
    """Whether this is a class that offers what the contract does; a protocol asks for its methods alone."""
    if not inspect.isclass(value) or value is contract:
        return False
    if getattr(contract, "_is_protocol", False):
        return all(hasattr(value, name) for name in ("log", "close", "package", "sends"))
    return issubclass(value, contract)


def conf_dirs() -> list[Path]:
    """The folders of config groups that other packages bring."""
    found: list[Path] = []
    for entry in _entries().select(group=CONF):
        with suppress(ImportError):  # a package above it is not there; its parts are missed when one is named
            if spec := find_spec(entry.value):  # without importing it
                found += [Path(place) / "conf" for place in spec.submodule_search_locations or ()]
    return [folder for folder in found if folder.is_dir()]
