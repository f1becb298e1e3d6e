"""Composing a config: what the groups give, what a command line may say, and every mistake in words."""

from __future__ import annotations

import re
import subprocess
import sys
from copy import deepcopy
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from picotrain import planning
from picotrain.config import (
    Config,
    classify_change,
    compose,
    data_preset,
    diff,
    dump,
    experiment_hash,
    flatten,
    load,
    run_name,
    with_values,
)
from picotrain.config.groups import GROUPS, choices, conf_dir
from picotrain.config.keys import leaves, rule
from picotrain.config.validate import validate
from picotrain.errors import ConfigError

composing = import_module("picotrain.config.compose")  # the package has a function of that name
_hydra = composing._hydra
SOURCE = str(Path(composing.__file__).parents[2])
CONF_FILES = sorted(conf_dir().rglob("*.yaml"))


@pytest.fixture
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra's part from memory: for tests of what comes after it."""

    def remembered(groups: dict[str, str], config_dir: Path | None) -> Any:
        return deepcopy(_hydra_once(tuple(groups.items()), config_dir))

    monkeypatch.setattr(composing, "_hydra", remembered)


@cache
def _hydra_once(groups: tuple[tuple[str, str], ...], config_dir: Path | None) -> Any:
    return _hydra(dict(groups), config_dir)


def problems(*overrides: str, **places: Any) -> dict[str, str]:
    """What compose refuses, by path."""
    with pytest.raises(ConfigError) as caught:
        compose(overrides, **places)
    assert caught.value.exit_code == 2
    assert len({problem.path for problem in caught.value.problems}) == len(caught.value.problems)
    return {problem.path: str(problem) for problem in caught.value.problems}


def saved(path: Path, *overrides: str, **changes: Any) -> Path:
    """A saved config with some lines of its YAML replaced."""
    text = dump(compose(overrides))
    for old, new in changes.items():
        assert re.search(rf"\b{old}: .*", text)
        text = re.sub(rf"\b{old}: .*", lambda _, new=new: new, text, count=1)
    path.write_text(text, encoding="utf-8")
    return path


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


# What the groups give -------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_design():
    config = compose()
    assert (config.model.depth, config.data.kind, config.optimizer.kind, config.schedule.kind) == (4, "auto", "adamw", "trapezoid")
    assert (config.hardware.device, config.parallel.kind, config.train.save_every, config.run.seed) == ("auto", "ddp", -1, 1337)


def test_every_choice_of_every_group_composes():
    needed = {("data", "files"): ["data.path=texts"], ("data", "mixture"): ["data.mixture=[{source: pystdlib}]"]}
    for group in GROUPS:
        for choice in choices(group):
            compose([f"{group}={choice}", *needed.get((group, choice), [])])


def test_the_groups_hold_the_choices_of_the_design():
    assert choices("model") == [*(f"d{depth}" for depth in (2, 4, 6, 8, 12, 16, 20, 24, 26, 32)), "llama_d4", "llama_d12"]
    assert set(choices("hardware")) == {"auto", "cpu", "mps", "1x4090"} | {f"{n}x{gpu}" for n in (1, 8) for gpu in ("h100", "h200", "a100")}
    assert set(choices("schedule")) == {"trapezoid", "cosine", "constant"}
    assert set(choices("cadence")) == {"default", "smoke", "none"}
    assert set(choices("experiment")) == {"speedrun", "cpu_speedrun", "cpu_d4"}
    assert set(choices("data")) == {"auto", "pystdlib", "files", "climbmix", "fineweb_edu", "mixture"}


@pytest.mark.parametrize("choice", choices("model"))
def test_a_model_is_its_depth(choice: str):
    config = yaml.safe_load((conf_dir() / "model" / f"{choice}.yaml").read_text())
    kind, _, number = choice.rpartition("d")
    depth, more = int(number), {"kind": "llama", "n_kv_heads": 2} if kind == "llama_" else {}
    assert config == {"depth": depth, "head_dim": 64 if depth < 12 else 128} | more
    assert 64 * depth % config["head_dim"] == 0 or depth < 12


@pytest.mark.parametrize("path", CONF_FILES, ids=lambda path: path.relative_to(conf_dir()).as_posix())
def test_a_config_file_says_when_to_use_it_and_what_its_numbers_are(path: Path):
    lines = path.read_text(encoding="utf-8").splitlines()
    package = {"cadence": "# @package train", "experiment": "# @package _global_"}.get(path.parent.name)
    if package:
        assert lines.pop(0) == package
    assert lines[0].startswith("# ") and "@" not in lines[0]
    for line in lines:
        if re.match(r"\s*(?!kind)\w+: \S", line):
            assert " # " in line, line


@pytest.mark.parametrize("name", ["config", "cadence/default", "hardware/auto", "tokenizer/bpe", "parallel/ddp", "logger/default"])
def test_what_the_default_files_spell_out_is_the_schemas_default(name: str):
    tree = yaml.safe_load((conf_dir() / f"{name}.yaml").read_text(encoding="utf-8"))
    tree.pop("defaults", None)
    tree.pop("sampling", {}).pop("prompts", None)
    node = {"cadence/default": "train"}.get(name, name.partition("/")[0])
    tree = tree if name == "config" else {node: tree}
    adamw = {"matrix_lr": 1, "embed_lr": 1, "head_lr": 1}
    rest = {
        "model": {"depth": 4, "head_dim": 64},
        "data": {"kind": "auto", "name": "x"},
        "optimizer": adamw,
        "schedule": {"kind": "constant"},
    }
    assert validate({**rest, **tree}) == validate(rest)


def test_a_hardware_preset_sets_only_what_the_hardware_decides():
    plain = compose(["hardware=auto"])
    for choice in choices("hardware"):
        assert {key.partition(".")[0] for key, _, _ in diff(plain, compose([f"hardware={choice}"]))} <= {"hardware"}
    eight = compose(["hardware=8xh100"]).hardware
    assert (eight.device, eight.nproc_per_node, eight.name, eight.peak_flops) == ("cuda", 8, "NVIDIA H100 80GB HBM3", None)


def test_a_hub_corpus_pins_its_validation_shard():
    for name, last in {"climbmix": 6542, "fineweb_edu": 1822}.items():
        data = compose([f"data={name}"]).data
        assert data.file_pattern and data.max_shards == last + 1 and data.val_shard == data.file_pattern.format(index=last)
        assert data_preset(name) == data


def test_a_preset_overrides_groups_and_values():
    config = compose(["experiment=speedrun"])
    assert (config.model.depth, config.hardware.nproc_per_node, config.data.name) == (24, 8, "climbmix")
    assert config.train.target_param_data_ratio == 8
    small = compose(["experiment=cpu_speedrun"])
    assert (small.tokenizer.vocab_size, small.hardware.device, small.data.kind) == (2048, "cpu", "pystdlib")


def test_the_command_line_beats_a_preset_by_value_and_by_group():
    config = compose(["experiment=speedrun", "train.eval_every=7", "model=d6", "data=pystdlib"])
    assert (config.train.eval_every, config.model.depth, config.data.kind, config.data.num_shards) == (7, 6, "pystdlib", None)
    silent = compose(["experiment=cpu_speedrun", "cadence=none"])
    assert (silent.train.eval_every, silent.train.sample_every) == (0, 0)
    assert silent.train.max_steps == compose(["experiment=cpu_speedrun"]).train.max_steps, "the horizon is no cadence"


def test_naming_the_choice_that_a_preset_makes_itself_changes_nothing():
    for preset, words in {
        "cpu_d4": ["model=d4", "data=pystdlib", "hardware=cpu", "optimizer=muon", "tokenizer=bpe", "cadence=default", "schedule=trapezoid"],
        "speedrun": ["model=d24", "data=climbmix", "hardware=8xh100"],
    }.items():
        assert compose([f"experiment={preset}", *words]) == compose([f"experiment={preset}"])


def test_another_size_keeps_the_features_of_a_preset_and_another_kind_of_optimizer_not_the_rates():
    preset = compose(["experiment=cpu_d4"])
    larger = compose(["experiment=cpu_d4", "model=d6"])
    assert larger.model == preset.model.model_copy(update={"depth": 6})
    assert larger.model.value_embeds and larger.model.qk_scale == 1.3
    assert compose(["experiment=cpu_d4", "optimizer=adamw"]).optimizer == compose(["optimizer=adamw"]).optimizer


def test_the_order_of_groups_and_values_does_not_matter():
    assert compose(["data=files", "data.path=/a", "model.width=256", "model=d2"]) == compose(
        ["model=d2", "data.path=/a", "data=files", "model.width=256"]
    )


def test_a_repeated_word_counts_once_the_last():
    config = compose(["model=d2", "train.max_steps=1", "run.name=a", "model=d6", "train.max_steps=2", "run.name=b"])
    assert (config.model.depth, config.train.max_steps, config.run.name) == (6, 2, "b")


def test_a_plus_in_front_of_a_known_key_or_group_changes_nothing():
    assert compose(["+train.max_steps=5", "++run.name=x", "+experiment=cpu_speedrun"]) == compose(
        ["train.max_steps=5", "run.name=x", "experiment=cpu_speedrun"]
    )


def test_experiment_null_is_no_preset():
    assert compose(["experiment=null"]) == compose()


# Values ---------------------------------------------------------------------------------------------------

LITERAL = [
    "2024-01-01",
    "~/runs",
    "a#b",
    " # no comment",
    "what?",
    "a=b==c",
    "two words",
    "{x: 1}",
    "a,b",
    "[a]",
    "'q'",
    '"q"',
    "1e3",
    "007",
    "true",
]
LITERAL += [
    "Null",
    "NULL",
    "???",
    "choice(a,b)",
    "$HOME",
    "\\",
    "a\\'b",
    "é ü 漢字 🎈",
    "*",
    "&x",
    "!tag",
    "%",
    "@",
    "`",
    "-",
    ": x",
    "tab\there",
    "a\nb",
]


@pytest.mark.parametrize("text", LITERAL)
def test_text_is_taken_as_it_was_typed_and_survives_saving(text: str, tmp_path: Path, composed_once: None):
    config = compose([f"data.name={text}", "data=files", f"data.path={text}", f"sampling.prompts=x{text}"])
    assert (config.data.name, config.data.path, config.sampling.prompts) == (text, text, (f"x{text}",))
    (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert load(tmp_path / "config.yaml") == config


def test_only_null_is_none_for_a_text():
    assert compose(["run.name=x", "run.name=null"]).run.name is None


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("train.seq_len=1_024", 1024),
        ("train.target_tokens=1e9", 10**9),
        ("train.grad_clip=null", None),
        ("train.grad_clip=.5", 0.5),
        ("optimizer.eps=1e-8", 1e-8),
        ("train.deterministic=True", True),
        ("hardware.compile=false", False),
        ("hardware.compile=auto", "auto"),
        ("train.total_batch_size=-1", -1),
        ("train.eval_every=-5", -5),
        ("sampling.prompts=Once upon a time, there", ("Once upon a time, there",)),
        ('sampling.prompts=["a, b: {c} #1", d e, 2024-01-01, yes]', ("a, b: {c} #1", "d e", "2024-01-01", "yes")),
        ("sampling.prompts=[]", ()),
        ("logger.trackers=[tensorboard,wandb]", ("tensorboard", "wandb")),
        ("logger.trackers=wandb", ("wandb",)),
    ],
)
def test_other_values_are_read_by_their_looks(word: str, value: Any, composed_once: None):
    assert flatten(compose([word]))[word.partition("=")[0]] == value


# Mistakes -------------------------------------------------------------------------------------------------

MISTAKES = {
    # word: (path, what the message has to say)
    "model=d5": ("model=d5", "no such choice in group 'model' (nearest: d4, d6; all: d2, d4, d6, d8, d12,"),
    "model=2": ("model=2", "nearest: d2"),
    "model=null": ("model=null", "all: d2, d4"),
    "model=": ("model=", "no such choice"),
    "hardware=h100": ("hardware=h100", "1xh100"),
    "cadence=null": ("cadence=null", "no such choice"),
    "experiment=sppedrun": ("experiment=sppedrun", "nearest: speedrun"),
    "train.seqlen=512": ("train.seqlen", "there is no such key (did you mean train.seq_len?)"),
    "+train.seqlen=512": ("train.seqlen", "there is no such key (did you mean train.seq_len?)"),
    "seq_len=512": ("seq_len", "did you mean train.seq_len=512?"),
    "cadence.eval_every=5": ("cadence.eval_every", "did you mean train.eval_every?"),
    "optimiser.eps=1": ("optimiser.eps", "did you mean optimizer.eps?"),
    "modle=d4": ("modle", "did you mean model?"),
    "model@train=d4": ("model@train", "there is no such key"),
    "train.frobnicate=1": ("train.frobnicate", "train has train.seq_len,"),
    "frobnicate=1": ("frobnicate", "sections: run, model,"),
    "train.seq_len.x=1": ("train.seq_len.x", "there is no such key"),
    "train=512": ("train", "is a section"),
    "train.seq_len=true": ("train.seq_len", "must be a whole number of at least 8, or null, not true"),
    "train.seq_len=long": ("train.seq_len", "not 'long'"),
    "train.seq_len=512.5": ("train.seq_len", "not 512.5"),
    "train.seq_len=0": ("train.seq_len", "of at least 8"),
    "train.max_steps=0": ("train.max_steps", "above 0"),
    "train.max_steps=-5": ("train.max_steps", "above 0"),
    "train.max_steps=": ("train.max_steps", "has no value"),
    "train.max_steps=1__0": ("train.max_steps", "whole number"),
    "train.max_steps=" + "9" * 5000: ("train.max_steps", "whole number"),
    "train.num_train_epochs=0": ("train.num_train_epochs", "must be a number above 0"),
    "train.target_flops=1e999": ("train.target_flops", "must be a number above 0"),
    "train.target_flops=nan": ("train.target_flops", "must be a number above 0"),
    "train.total_batch_size=0": ("train.total_batch_size", "must be a whole number above 0, or -1, not 0"),
    "train.total_batch_size=-2": ("train.total_batch_size", "or -1"),
    "train.device_batch_size=0": ("train.device_batch_size", "or auto"),
    "train.eval_tokens=0": ("train.eval_tokens", "above 0"),
    "train.precision=bf61": ("train.precision", "must be one of auto, fp32, bf16, fp8, not 'bf61' (did you mean bf16?)"),
    "train.deterministic=1": ("train.deterministic", "must be true or false, not 1"),
    "hardware.compile=yes": ("hardware.compile", "must be true or false, or auto, not 'yes'"),
    "hardware.nproc_per_node=0": ("hardware.nproc_per_node", "above 0"),
    "optimizer.matrix_lr=0": ("optimizer.matrix_lr", "above 0"),
    "optimizer.beta2=1": ("optimizer.beta2", "of at least 0 and below 1"),
    "schedule.warmup_steps=-1": ("schedule.warmup_steps", "of at least 0"),
    "schedule.final_fraction=1.5": ("schedule.final_fraction", "of at least 0 and of at most 1"),
    "tokenizer.vocab_size=256": ("tokenizer.vocab_size", "of at least 257"),
    "run.seed=-1": ("run.seed", "of at least 0"),
    "run.name=": ("run.name", "must be text"),
    "data.name=null": ("data.name", "must be text, not null"),
    "model.window_pattern=LXS": ("model.window_pattern", "^[SL]+$"),
    "model.head_dim=63": ("model.head_dim", "an even number"),
    "model.width=100": ("model.width", "must be a multiple of model.head_dim=64, not 100 (nearest: 64 or 128)"),
    "model.n_kv_heads=3": ("model.n_kv_heads", "must divide the 4 heads (width 256 / head_dim 64), and 3 does not (valid: 1, 2, 4)"),
    "data=files": ("data.path", "must be given for data.kind=files"),
    "data.path=/texts": ("data.path", "add data=files"),
    "data.repo_id=a/b": ("data.repo_id", "kind=hub only"),
    "schedule.kind=cosine": ("schedule.warmdown_fraction", "schedule=cosine instead"),
    "launch.nnodes=2": ("launch.rdzv_endpoint", "must be given"),
    "launch.node_rank=1": ("launch.node_rank", "must be below launch.nnodes=1"),
    "schema_version=2": ("schema_version", "must be 1"),
    "hydra.run.dir=x": ("hydra.run.dir", "would do nothing"),
    "+hydra.verbose=true": ("hydra.verbose", "would do nothing"),
    "hydra/launcher=basic": ("hydra/launcher", "would do nothing"),
    "model=d4,d6": ("model", "looks like a sweep (start one run for each, the first with model=d4)"),
    "model=choice(d4,d6)": ("model", "the first with model=d4"),
    "train.max_steps=1,2": ("train.max_steps", "looks like a sweep"),
    "train.max_steps=range(1,5)": ("train.max_steps", "looks like a sweep"),
    "hardware.device=cpu,cuda": ("hardware.device", "looks like a sweep"),
    "logger.trackers=tensorboard,wandb": ("logger.trackers", "logger.trackers=[tensorboard,wandb]"),
    "logger.trackers=[wandbb]": ("logger.trackers", "one of tensorboard, wandb"),
    "sampling.prompts=[a, {b: c}]": ("sampling.prompts", "quotes"),
    "sampling.prompts=[a": ("sampling.prompts", "is not a list"),
    "sampling.prompts.0=a": ("sampling.prompts.0", "there is no such key"),
    "~train.grad_clip": ("train.grad_clip", "cannot be deleted"),
    "~model": ("model", "cannot be deleted"),
    "train.max_steps": ("train.max_steps", "write key=value"),
    "max_steps": ("max_steps", "write key=value, e.g. train.max_steps=..."),
    "": ("", "write key=value"),
    "=5": ("=5", "no key before the ="),
    "data.repo_id=${oc.env:HF_TOKEN}": ("data.repo_id", "never taken from the environment"),
    "train.max_steps=${oc.env:STEPS}": ("train.max_steps", "never taken from the environment"),
    "run.name=${model.depth}": ("run.name", "is an interpolation"),
    "sampling.prompts=[a, '${oc.env:HOME}']": ("sampling.prompts", "environment"),
}


@pytest.mark.parametrize("word", MISTAKES, ids=lambda word: word[:40])
def test_a_mistake_is_one_problem_with_its_path_and_what_would_be_right(word: str, composed_once: None):
    path, message = MISTAKES[word]
    found = problems(word)
    assert list(found) == [path]
    assert message in found[path]


def test_all_mistakes_come_at_once():
    words = ["model=d5", "train.seqlen=1", "train.seq_len=true", "hydra.run.dir=x", "model.width=100", "schedule.warmup_steps=-1", "oops"]
    found = problems(*words, "launch.nnodes=2")
    first = ["model=d5", "train.seqlen", "hydra.run.dir", "oops"]
    assert list(found)[:4] == first, "in the order of the command line"
    assert set(found) == {*first, "schedule.warmup_steps", "train.seq_len", "launch.rdzv_endpoint"}
    assert "model.width" not in found, "what contradicts a choice that was refused is not known to be wrong"


def test_two_contradictions_of_a_section_are_both_told():
    assert set(problems("data=climbmix", "data.num_shards=7000", "data.file_pattern=shard.parquet")) == {
        "data.num_shards",
        "data.file_pattern",
    }


# The horizon ----------------------------------------------------------------------------------------------


def test_two_horizons_on_the_command_line_are_refused_with_both_names():
    found = problems("train.max_steps=100", "train.target_tokens=1e6")
    assert list(found) == ["train.max_steps"]
    assert "train.target_tokens" in found["train.max_steps"]


def test_two_horizons_in_a_preset_are_refused_with_both_names(tmp_path: Path):
    folder = write(tmp_path, {"experiment/two.yaml": "# @package _global_\ntrain: {max_steps: 5, target_flops: 1.0e+12}\n"})
    found = problems("experiment=two", config_dir=folder)
    assert list(found) == ["train.max_steps"] and "train.target_flops" in found["train.max_steps"]
    assert compose(["experiment=two", "train.num_train_epochs=1"], config_dir=folder).train.max_steps is None


def test_a_horizon_on_the_command_line_replaces_a_presets():
    train = compose(["experiment=speedrun", "train.max_steps=10"]).train
    assert (train.max_steps, train.target_param_data_ratio) == (10, None)
    assert compose(["experiment=speedrun", "train.target_param_data_ratio=null"]).train.target_param_data_ratio is None


def test_a_horizon_set_to_null_does_not_count():
    assert compose(["train.max_steps=null", "train.target_tokens=1000"]).train.target_tokens == 1000


# A folder of one's own ------------------------------------------------------------------------------------


def test_a_folder_of_ones_own_adds_choices(tmp_path: Path):
    folder = write(
        tmp_path / "my conf, #1",
        {
            "model/wide.yaml": "depth: 4\nhead_dim: 64\nwidth: 512\n",
            "data/mine.yaml": "defaults: [files]\nname: mine\npath: 2024-01-01\n",
            "experiment/try.yaml": "# @package _global_\ndefaults:\n  - override /model: wide\n"
            "  - override /data: mine\nrun:\n  name: d${model.depth}\n",
        },
    )
    config = compose(["experiment=try"], config_dir=folder)
    assert (config.model.width, config.data.kind, config.data.path, config.run.name) == (512, "files", "2024-01-01", "d4")
    assert compose(["experiment=try", "model.depth=6"], config_dir=folder).run.name == "d6", "resolved after the command line"
    assert "wide" in problems("model=wode", config_dir=folder)["model=wode"]


def test_unknown_keys_and_wrong_types_in_yaml_are_refused_like_on_the_command_line(tmp_path: Path):
    folder = write(
        tmp_path,
        {
            "experiment/bad.yaml": "# @package _global_\ntrain:\n  seqlen: 5\n  max_steps: soon\nmodle:\n  depth: 3\nrun: 7\n",
            "data/number.yaml": "kind: files\nname: 12\npath: ???\n",
        },
    )
    found = problems("experiment=bad", "data=number", config_dir=folder)
    assert set(found) == {"train.seqlen", "train.max_steps", "modle", "run", "data.name", "data.path"}
    assert "did you mean train.seq_len?" in found["train.seqlen"] and "did you mean model?" in found["modle"]
    assert "has to be given" in found["data.path"] and "must be text, not 12" in found["data.name"]


@pytest.mark.parametrize(
    ("files", "word", "message"),
    [
        ({"data/s.yaml": "kind: files\nname: s\npath: ${oc.env:HOME}\n"}, "data=s", "environment"),
        ({"data/s.yaml": "kind: files\nname: s\npath: ${oc.decode:${oc.env:HOME}}\n"}, "data=s", "environment"),
        ({"data/s.yaml": "kind: files\nname: s\npath: a/${${data.name}:HOME}\n"}, "data=s", "interpolation"),
        ({"data/s.yaml": "defaults:\n  - ${oc.env:PICOTRAIN_TEST}\n"}, "data=s", "environment"),
        ({"data/s.yaml": "kind: files\nname: s\npath: ${data.nowhere}\n"}, "data=s", "nowhere"),
        ({"data/s.yaml": "kind: files\nname: ${data.path}\npath: ${data.name}\n"}, "data=s", "data"),
        ({"data/s.yaml": "kind: [files\n"}, "data=s", "is not YAML: line"),
        ({"data/s.yaml": "kind: !!python/object/apply:os.system [exit]\n"}, "data=s", "is not YAML: line 1"),
        (
            {"experiment/s.yaml": "# @package _global_\ndefaults:\n  - override /data: ${oc.env:PICOTRAIN_TEST}\n"},
            "experiment=s",
            "environment",
        ),
        ({"experiment/s.yaml": "# @package _global_\ndefaults:\n  - override /model: d5\n"}, "experiment=s", "nearest: d4, d6"),
        ({"experiment/s.yaml": "# @package _global_\ndefaults:\n  - /model: d6\n"}, "experiment=s", "override"),
        ({"experiment/s.yaml": "defaults: 5\n"}, "experiment=s", "defaults must be a list"),
        ({"experiment/s.yaml": "run: &a {name: *a}\n"}, "experiment=s", "recurs"),
        ({"experiment/s.yaml": "train: {max_steps: 5}\n"}, "experiment=s", "begins with the line '# @package _global_'"),
        ({"model/d4.yaml": "depth: 5\n"}, "model=d4", "has the name of the built-in model=d4"),
        ({"modle/d5.yaml": "depth: 5\n"}, "model=d4", "has no folder of a config group"),
    ],
)
def test_a_folder_that_cannot_be_used_is_explained(
    files: dict[str, str], word: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PICOTRAIN_TEST", "pystdlib")
    found = problems(word, config_dir=write(tmp_path, files))
    assert any(message in text for text in found.values()), found


def test_a_config_folder_that_is_not_there_is_refused(tmp_path: Path):
    assert "does not exist" in problems(config_dir=tmp_path / "nowhere")[str(tmp_path / "nowhere")]


# Saved configs --------------------------------------------------------------------------------------------


def test_a_saved_config_reads_back_equal_with_its_keys_in_order(tmp_path: Path):
    config = compose(["experiment=speedrun", "run.name=a b", "run.seed=7"])
    (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert load(tmp_path / "config.yaml") == config
    assert list(yaml.safe_load(dump(config))) == list(Config.model_fields)


def test_a_saved_config_gives_everything_but_the_place_of_its_run(tmp_path: Path):
    path = saved(tmp_path / "config.yaml", "experiment=cpu_speedrun", "run.name=old", "run.dir=/old", "run.seed=7", "model.width=128")
    config = compose(["train.eval_every=5", "run.name=new"], config_file=path)
    assert (config.run.name, config.run.dir, config.train.eval_every, config.model.width) == ("new", None, 5, 128)
    assert config.run.seed == 7, "the losses depend on it"
    assert compose(config_file=path, same_run=True) == load(path)


def test_a_horizon_replaces_a_saved_configs(tmp_path: Path):
    path = saved(tmp_path / "config.yaml", "train.max_steps=5")
    train = compose(["train.target_tokens=1000"], config_file=path).train
    assert (train.max_steps, train.target_tokens) == (None, 1000)


def test_a_group_cannot_be_chosen_beside_a_saved_config(tmp_path: Path):
    path = saved(tmp_path / "config.yaml")
    found = problems("model=d6", "experiment=speedrun", "train.seqlen=5", "train.eval_tokens=0", config_file=path)
    assert list(found) == ["train.seqlen", "model=d6", "experiment=speedrun", "train.eval_tokens"]
    assert "beside a saved config" in found["model=d6"]


@pytest.mark.parametrize(
    ("old", "new", "path", "message"),
    [
        ("seq_len", "seqlen: 5", "train.seqlen", "did you mean train.seq_len?"),
        ("schema_version", "schema_version: 2", "schema_version", "must be 1, not 2"),
        ("schema_version", "# none", "schema_version", "must be 1, not None"),
        ("schema_version", "schema_version: true", "schema_version", "must be 1, not True"),
        ("matrix_lr", "matrix_lr: ${oc.env:LR}", "optimizer.matrix_lr", "environment"),
        ("matrix_lr", "matrix_lr: ${optimizer.head_lr}", "optimizer.matrix_lr", "is an interpolation"),
        ("depth", "depth: yes", "model.depth", "must be a whole number above 0, not true"),
        ("depth", "# none", "model.depth", "is missing (must be a whole number above 0)"),
        ("name", "name: 2024-01-01", "run.name", "must be text, or null, not datetime.date(2024, 1, 1)"),
    ],
)
def test_a_saved_config_that_was_tampered_with_is_refused(old: str, new: str, path: str, message: str, tmp_path: Path):
    file = saved(tmp_path / "config.yaml", **{old: new})
    for read in (load, lambda file: compose(config_file=file, same_run=True)):
        with pytest.raises(ConfigError) as caught:
            read(file)
        assert [problem.path for problem in caught.value.problems] == [path]
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: !!python/object/apply:os.mkdir [{}]\nschema_version: 1\n", "is not plain YAML: line 1"),
        ("run: !!python/name:os.system\nschema_version: 1\n", "is not plain YAML: line 1"),
        ("schema_version: 1\nrun: &a {x: *a}\n", "an alias (*name) is not plain YAML"),
        ("schema_version: 1\nschema_version: 1\n", "line 2: the key 'schema_version' is there twice"),
        ("a: [\n", "is not plain YAML"),
        ("", "holds no keys"),
        ("- 1\n", "holds no keys"),
        ("a: " + "[" * 5000, "cannot read"),
        ("a: " + "9" * 5000 + "\n", "cannot read"),
        ("a: 2024-13-45\n", "cannot read"),
        ("a: \x00\n", "is not plain YAML"),
    ],
)
def test_a_file_that_is_no_saved_config_is_refused_and_runs_nothing(text: str, message: str, tmp_path: Path):
    trap = tmp_path / "made by code"
    file = tmp_path / "config.yaml"
    file.write_text(text.replace("{}", str(trap)), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert [problem.path for problem in caught.value.problems] == [str(file)] and message in str(caught.value)
    assert not trap.exists()


def test_a_saved_config_that_cannot_be_read_is_refused(tmp_path: Path):
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\n")
    (tmp_path / "config.yaml").touch()
    assert "no such file" in problems(config_file=tmp_path / "none.yaml")[str(tmp_path / "none.yaml")]
    assert f"its config is {tmp_path / 'config.yaml'}" in problems(config_file=tmp_path)[str(tmp_path)]
    assert "UTF-8" in problems(config_file=tmp_path / "latin.yaml")[str(tmp_path / "latin.yaml")]


def test_a_config_folder_beside_a_saved_config_is_refused(tmp_path: Path):
    path = saved(tmp_path / "config.yaml")
    assert (
        "is not read beside --config"
        in problems(config_file=path, config_dir=write(tmp_path / "mine", {"model/x.yaml": ""}))[str(tmp_path / "mine")]
    )


# Which experiment -----------------------------------------------------------------------------------------


def test_the_hash_follows_the_experiment_and_nothing_else():
    base = compose(["data=files", "data.path=a"])
    same = ["train.eval_every=9", "train.eval_tokens=9", "train.sample_every=9", "train.save_every=9", "train.device_batch_size=2"]
    same += [
        "train.precision=fp32",
        "hardware=cpu",
        "run.name=x",
        "run.dir=/x",
        "logger.log_every=3",
        "sampling.top_k=3",
        "launch.grace_s=5",
    ]
    assert experiment_hash(compose(["data=files", "data.path=a", *same])) == experiment_hash(base)
    for word in ("run.seed=7", "model=d6", "data.path=b", "tokenizer.path=t", "train.max_steps=9", "optimizer.eps=1e-9", "schedule=cosine"):
        assert experiment_hash(compose(["data=files", "data.path=a", word])) != experiment_hash(base), word


def test_the_hash_is_the_same_in_another_process():
    code = "from picotrain.config import *; print(experiment_hash(compose(['model=d6'])))"
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={"PYTHONHASHSEED": "5", "PYTHONPATH": SOURCE}
    )
    assert out.stdout.strip() == experiment_hash(compose(["model=d6"]))


def test_a_run_name_is_fit_for_a_folder():
    assert re.fullmatch(r"d6-pystdlib-[0-9a-f]{8}", run_name(compose(["model=d6", "data=pystdlib"])))
    assert re.fullmatch(r"d4-a-b-c-[0-9a-f]{8}", run_name(compose(["data.name=../a/b c"])))


def test_diff_names_the_keys_that_differ_with_both_values():
    a = compose(["train.max_steps=5"])
    assert diff(a, compose(["train.max_steps=6", "model=d6"])) == [("model.depth", 4, 6), ("train.max_steps", 5, 6)]
    assert diff(a, a) == []


def test_what_a_resume_may_change_is_that_of_the_design():
    expected = {
        "free": "train.eval_every train.save_every train.sample_every logger.log_every sampling.prompts "
        "data.path run.dir run.name run.resume run.cache_dir",
        "rounding": "hardware.device hardware.compile parallel.kind launch.nnodes train.device_batch_size train.precision "
        "hardware.recompute evaluation.bpb.device_batch_size",
        "announced": "train.max_steps train.target_tokens train.target_flops train.num_train_epochs train.target_param_data_ratio "
        "schedule.kind schedule.warmdown_fraction optimizer.matrix_lr optimizer.weight_decay train.grad_clip",
        "refused": "model.depth tokenizer.vocab_size data.lanes data.kind train.seq_len train.total_batch_size run.seed optimizer.kind",
    }
    for change, keys in expected.items():
        assert {key: classify_change(key) for key in keys.split()} == dict.fromkeys(keys.split(), change)
    assert all(classify_change(key) for key in leaves())


def test_with_values_gives_a_validated_copy():
    config = compose()
    assert with_values(config, {"train.seq_len": 512, "data.lanes": 8}).data.lanes == 8
    with pytest.raises(ConfigError, match=r"train\.seq_len: must be"):
        with_values(config, {"train.seq_len": "auto"})
    with pytest.raises(ConfigError, match=r"train\.seqlen: there is no such key"):
        with_values(config, {"train.seqlen": 5})
    assert config == compose()


# How it is done -------------------------------------------------------------------------------------------


def test_every_key_has_its_rule_in_words():
    for key in leaves():
        assert rule(key) and "{" not in rule(key)


def test_hydra_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from picotrain.config.compose import hydra_options

    monkeypatch.chdir(tmp_path)
    compose(["model=d6"])
    assert not GlobalHydra.instance().is_initialized()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("PICOTRAIN_TEST", "still there")
    with initialize_config_dir(str(conf_dir()), **hydra_options()):
        compose(["model=d6"])
        assert hydra_compose("config", ["model=d8"]).model.depth == 8, "the caller's own Hydra goes on working"
    assert OmegaConf.create({"a": "${oc.env:PICOTRAIN_TEST}"}).a == "still there"


def test_importing_the_config_imports_neither_hydra_nor_torch():
    code = "import sys, picotrain.config, picotrain.cli.completion; print([m for m in ('hydra', 'omegaconf', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env={"PYTHONPATH": SOURCE})
    assert out.stdout.strip() == "[]"


def test_a_name_with_an_exotic_line_break_survives_a_saved_config(tmp_path: Path):
    config = compose(["model=d2", "data=pystdlib", "data.name=a\x85b\u2028c é"])
    (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert load(tmp_path / "config.yaml").data.name == "a\x85b\u2028c é"


# -- mixtures


MIXTURE = "data.mixture=[{source: pystdlib, weight: 0.7}, {source: s3://bucket/books, weight: 0.3, at_end: stop}]"


def test_a_mixture_is_a_list_of_sources_and_survives_a_saved_config(tmp_path):
    config = compose(["data=mixture", MIXTURE])
    assert [(entry.name, entry.weight, entry.at_end) for entry in config.data.mixture] == [
        ("pystdlib", 0.7, "wrap"),
        ("books", 0.3, "stop"),
    ]
    saved = tmp_path / "config.yaml"
    saved.write_text(dump(config))
    assert load(saved) == config


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.mixture=[{sorce: a}]", r"data.mixture\[0\].sorce: there is no such key \(did you mean source\?\)"),
        ("data.mixture=[{sorce: a}]", r"data.mixture\[0\].source: is missing"),
        ("data.mixture=[{source: a}, {source: b, weight: -1}]", r"data.mixture\[1\].weight: .*greater than 0, not -1"),
        ("data.mixture=[{source: a, at_end: never}]", r"data.mixture\[0\].at_end: .*'wrap' or 'stop'"),
        ("data.mixture=[a, b]", "data.mixture: is not a list of sections"),
        ("data.mixture=a", "data.mixture: is not a list of sections"),
        ("data.mixture=[{source: x/a}, {source: y/a}]", "several sources called a"),
        ("data.mixture=[{source: a, at_end: stop}]", "would run dry"),
        ("data.mixture=[]", "must be given for data.kind=mixture"),
    ],
)
def test_a_mistake_in_a_mixture_is_named_with_its_place(word, message):
    with pytest.raises(ConfigError, match=message):
        compose(["data=mixture", word])


def test_a_mixture_wants_the_group_mixture():
    with pytest.raises(ConfigError, match=r"data.mixture: is read for data.kind=mixture only, and this is auto \(add data=mixture\)"):
        compose([MIXTURE])


def test_credentials_in_a_data_url_are_refused():
    with pytest.raises(ConfigError, match="data.path: holds credentials") as error:
        compose(["data=files", "data.path=https://me:hunter2@example.org/corpus"])
    assert "hunter2" not in str(error.value)
    with pytest.raises(ConfigError, match="data.path: holds credentials"):
        compose(["data=files", "data.path=https://example.org/corpus?X-Amz-Signature=hunter2"])
    with pytest.raises(ConfigError, match="data.mixture: holds credentials"):
        compose(["data=mixture", "data.mixture=[{source: 'https://me:hunter2@example.org/corpus'}]"])


# -- numbers that overflow where they are used


@pytest.mark.parametrize(
    "words",
    [
        "run.seed=9223372036854775808",
        "run.seed=18446744073709551616",
        "run.seed=-1",
        "train.max_steps=4611686018427387904",
        "train.max_steps=1000000000000 train.total_batch_size=1073741824",
        "train.num_train_epochs=1e300",
        "train.target_tokens=99999999999999999999",
        "train.target_flops=1e30",
        "train.target_param_data_ratio=1e6 model.depth=9999",
        "train.eval_every=-99999999999999999999",
        "train.eval_tokens=99999999999999999999999",
        "train.grad_clip=1e300",
        "model.depth=10000 model.width=1048576",
        "model.rope_theta=1e300",
        "tokenizer.vocab_size=99999999999",
        "optimizer.matrix_lr=1e300",
        "launch.grace_s=1e300",
        "launch.hang_s=1e10",
        "checkpoint.rolling_minutes=1e300",
        "archive.interval_s=1e300",
        "sampling.max_tokens=99999999999999999999",
        "hardware.threads=999999999999",
        "hardware.memory_bytes=99999999999999999999",
    ],
)
def test_a_number_too_large_for_where_it_is_used_is_refused_by_its_key(words: str):
    with pytest.raises(ConfigError) as refused:
        planning.make(planning.decide(compose(["data=pystdlib", "hardware=cpu", *words.split()])), "run")
    assert {problem.path for problem in refused.value.problems} <= {word.partition("=")[0] for word in words.split()} | {
        "train.target_param_data_ratio"
    }


def test_every_number_of_the_config_has_an_upper_bound():
    """What anybody may type into a key of numbers: ten to the 400 is refused, by a message and not by an overflow."""
    for key, leaf in leaves().items():
        if {int, float} & set(leaf.kinds):
            with pytest.raises(ConfigError) as refused:
                compose(["data=pystdlib", f"{key}={10**400}"])
            assert key in [problem.path for problem in refused.value.problems]


@pytest.mark.parametrize("name", ["../../x", "..", "a//b", "a/../b", "/abs", "a\nb", "\x1b[2J", "x" * 300, "."])
def test_a_run_name_stays_below_its_folder(name: str):
    with pytest.raises(ConfigError) as refused:
        compose(["data=pystdlib", f"run.name={name}"])
    assert [problem.path for problem in refused.value.problems] == ["run.name"]


@pytest.mark.parametrize("endpoint", ["nohost:notaport", "host", ":29400", "host:", "host:0", "host:65536", "host:٣", "host:29400x"])
def test_a_meeting_place_is_a_host_and_a_port(endpoint: str):
    with pytest.raises(ConfigError) as refused:
        compose(["data=pystdlib", "launch.nnodes=2", f"launch.rdzv_endpoint={endpoint}"])
    assert [problem.path for problem in refused.value.problems] == ["launch.rdzv_endpoint"]
    assert compose(["data=pystdlib", "launch.nnodes=2", "launch.rdzv_endpoint=[::1]:29400"]).launch.nnodes == 2
