"""Composing a run's config: Hydra merges the groups, the command line's values come on top, the schema judges.

Hydra sees group choices only. Values are set on the merged tree, so that text stays as it was typed and every
mistake is found at once; then interpolations between keys are resolved, and none is left.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from picotrain import parts
from picotrain.config import places
from picotrain.config.groups import GROUPS, check_config_dir, choices, conf_dir, unknown_choice
from picotrain.config.overrides import Overrides, interpolation, parse
from picotrain.config.saved import read, yaml_reason
from picotrain.config.schema import HORIZONS, ROOMS, Config, DataConfig, section_class
from picotrain.config.validate import put, schema_for, strings, validate
from picotrain.errors import ConfigError, Problem
from picotrain.text import first_line

PLACES = ("name", "dir", "cache_dir", "resume")  # the keys of `run` that belong to one run, not to the experiment
# The keys of `train` that the group cadence sets.
CADENCE = ("eval_every", "eval_tokens", "core_metric_every", "core_metric_max_per_task", "sample_every", "save_every")
_PLAIN_INTERPOLATION = re.compile(r"\$\{[\w.]+\}")  # ${section.key}
_MISSING = "???"  # OmegaConf's mark of a value that has to be given


def compose(
    overrides: Sequence[str] = (), config_dir: Path | None = None, config_file: Path | None = None, same_run: bool = False
) -> Config:
    """The validated config of a command line.

    overrides: `group=choice` and `dotted.key=value` words.
    config_dir: a folder with more choices for the groups (`model/mine.yaml`).
    config_file: a saved config to start from instead of the groups. Of its `run` section only the seed is taken,
    which the losses depend on; same_run (a resume) takes all of it.
    Raises ConfigError with all the problems at once.
    """
    words = parse(overrides, config_dir)
    if config_file and config_dir:
        words.refuse(Problem(str(config_dir), "a config folder is not read beside --config", "the file has every key already"))
    try:
        tree = _saved_tree(config_file, words, same_run) if config_file else _grouped_tree(words.groups, config_dir)
    except ConfigError as error:
        words.read(_schema_of({}, words))
        raise ConfigError([*words.problems, *error.problems]) from None
    schema = _schema_of(tree, words)
    words.read(schema)
    _leave_to_defaults(tree, words, schema, config_dir)
    try:
        return _finish(tree, words)
    except ConfigError as error:
        raise ConfigError([*words.problems, *error.problems]) from None


def _schema_of(tree: dict[str, Any], words: Overrides) -> type[Config]:
    """The schema with the parts that groups and words name; what is wrong with their names is said by `validate`."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for key, (_, text) in words.texts.items():
        if key.endswith(".kind") or key.startswith("evaluation."):
            put(tree, key, text)
    return schema_for(tree)[0]


def _leave_to_defaults(tree: dict[str, Any], words: Overrides, schema: type[Config], config_dir: Path | None) -> None:
    """Where a kind was typed that has no choice of its own, the keys that the group's file has for another kind go."""
    for section in ROOMS:
        kind, values = words.values.get(f"{section}.kind"), tree.get(section)
        if isinstance(values, dict) and kind and kind not in choices(section, config_dir):
            known = section_class(schema, section).model_fields
            tree[section] = {name: value for name, value in values.items() if name in known}


def data_preset(name: str) -> DataConfig:
    """The `data` section of a built-in choice: what data=auto becomes once it is decided."""
    return DataConfig.model_validate(yaml.safe_load((conf_dir() / "data" / f"{name}.yaml").read_text(encoding="utf-8")))


def _finish(tree: dict[str, Any], words: Overrides) -> Config:
    """Set the command line's values, resolve, validate."""
    missing = [key for key, text in strings(tree) if text == _MISSING and key not in words.values]
    problems = [Problem(key, "has to be given", f"{key}=...") for key in missing]
    if any(words.values.get(f"train.{key}") is not None for key in HORIZONS):
        for key in HORIZONS:  # one on the command line replaces a preset's
            put(tree, f"train.{key}", None)
    for key, value in words.values.items():
        put(tree, key, value)
    tree = _resolved(tree)
    config = None
    try:
        config = validate(tree, words.doubtful)
    except ConfigError as error:
        problems += [found for found in error.problems if found.path not in missing]
    refused = {problem.path.partition("[")[0] for problem in problems}
    problems += [found for found in places.problems(tree) if found.path.partition("[")[0] not in refused]
    if config is None or problems or words.problems:
        raise ConfigError(problems)
    return config


def _saved_tree(config_file: Path, words: Overrides, same_run: bool) -> dict[str, Any]:
    for group, choice in words.groups.items():
        hint = f"change single keys instead, e.g. {group}.<key>=..." if group in Config.model_fields else "change single keys instead"
        words.refuse(Problem(f"{group}={choice}", "a group cannot be chosen beside a saved config, which has every key already", hint))
    tree = read(config_file)
    run = tree.get("run")
    if isinstance(run, dict) and not same_run:
        tree["run"] = {key: value for key, value in run.items() if key not in PLACES}
    return tree


def _resolved(tree: dict[str, Any]) -> dict[str, Any]:
    """Put values in place of ${section.key}; refuse any other interpolation, the environment's above all."""
    texts = [(key, text) for key, text in strings(tree) if "${" in text]
    if refused := [interpolation(key, text) for key, text in texts if "${" in _PLAIN_INTERPOLATION.sub("", text)]:
        raise ConfigError(refused)
    if not texts:
        return tree
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or texts[0][0]
        raise ConfigError([Problem(str(key), first_line(error), "${section.key} must name a key that has a value")]) from None
    assert isinstance(resolved, dict)
    return resolved  # type: ignore[return-value]


# Hydra ----------------------------------------------------------------------------------------------------


def _grouped_tree(groups: dict[str, str], config_dir: Path | None) -> dict[str, Any]:
    """The merged groups as plain values, interpolations in them as they are written."""
    if config_dir and (problems := check_config_dir(config_dir)):
        raise ConfigError(problems)
    tree, _ = _hydra(groups, config_dir)
    if "experiment" in groups and len(groups) > 1:
        _, presets = _hydra({"experiment": groups["experiment"]}, config_dir)
        others = {group: choice for group, choice in groups.items() if group != "experiment" and choice != presets[group]}
        if others:
            _choices_beat_preset(tree, _hydra(others, config_dir)[0], others)
    return tree


def _choices_beat_preset(tree: dict[str, Any], without_preset: dict[str, Any], groups: dict[str, str]) -> None:
    """A preset comes last, so that its values win over a group's; but not over a group chosen on the command line.

    What the choice's file says wins. What else the preset says of that group was meant for a choice of another kind where the group
    has kinds (Muon's rates, the shards of a data set), and goes; otherwise it stays: a larger model keeps the preset's features.
    """
    for group in groups:
        if group == "cadence":
            for key in CADENCE:
                if key in without_preset["train"]:
                    put(tree, f"train.{key}", without_preset["train"][key])
        elif group in without_preset:
            section = without_preset[group]
            tree[group] = section if "kind" in section else {**tree[group], **section}


def _hydra(groups: dict[str, str], config_dir: Path | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The merged tree of these choices, and the choice of every group, a preset's and the defaults' included."""
    from hydra import compose as hydra_compose
    from omegaconf import OmegaConf

    words = [f"{group}={_quoted(choice)}" for group, choice in groups.items()]
    if folders := [*parts.conf_dirs(), *([config_dir] if config_dir else [])]:
        words.append(f"hydra.searchpath=[{', '.join(_quoted(f'file://{folder.resolve()}') for folder in folders)}]")
    try:
        with _hydra_at(conf_dir()), _no_environment():
            composed = hydra_compose("config", words, return_hydra_config=True)
            tree = OmegaConf.to_container(composed, resolve=False)
    except Exception as error:  # of many kinds, all for what a user's files hold
        if config_dir is None:
            raise
        raise ConfigError([_hydra_problem(error, config_dir)]) from None
    assert isinstance(tree, dict)
    chosen = tree.pop("hydra")["runtime"]["choices"]
    return tree, chosen  # type: ignore[return-value]


def _hydra_problem(error: Exception, config_dir: Path) -> Problem:
    text = " ".join(str(error).split())
    if isinstance(error, yaml.YAMLError):
        mark = getattr(error, "problem_mark", None)
        return Problem(mark.name if mark else str(config_dir), f"is not YAML: {yaml_reason(error)}")
    if "oc.env" in text:
        return Problem(str(config_dir), "a defaults list is never taken from the environment", "write the choice itself, not ${oc.env:...}")
    absent = re.search(r"Could not find '(\w+)/([^']+)'", text)
    if absent and absent[1] in GROUPS:
        return unknown_choice(absent[1], absent[2], config_dir)
    return Problem(str(config_dir), f"cannot be composed: {text[:300]}")


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def hydra_options() -> dict[str, Any]:
    """Hydra 1.3 warns where version_base is left out, 1.4 where it is given; both then behave as 1.3."""
    from hydra import __version__

    return {"version_base": "1.3"} if __version__.startswith("1.3.") else {}


@contextmanager
def _hydra_at(folder: Path) -> Generator[None]:
    """Hydra set up on a folder, and put back as it was: the caller may be an application of Hydra itself."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    held = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), **hydra_options()):
            yield
    finally:
        GlobalHydra.instance().hydra = held


@contextmanager
def _no_environment() -> Generator[None]:
    """Refuse ${oc.env:...} where Hydra itself resolves: in a defaults list."""
    from omegaconf import OmegaConf, __version__
    from omegaconf.resolvers import oc

    # OmegaConf 2.4 warns of the name that 2.3 wants.
    register = getattr(OmegaConf, "register_new_resolver" if __version__.startswith("2.3.") else "register_resolver")

    def refuse(*_: Any) -> None:
        raise ValueError("values are never taken from the environment (oc.env)")

    register("oc.env", refuse, replace=True)
    try:
        yield
    finally:
        register("oc.env", oc.env, replace=True)
