"""From a composed config to the one that a run writes down: every `auto` and null decided, every place named, the same for all commands.

Numbers follow from the config and this machine's devices. Where the run is there already, they follow from its config.yaml. They never
follow from what the cache holds, so that the same words give the same config before and after a corpus is prepared. No torch.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

from picotrain import hardware, shape
from picotrain.config import places
from picotrain.config.compose import data_preset
from picotrain.config.identity import run_name
from picotrain.config.saved import load
from picotrain.config.schema import Config, DataConfig, MixtureSource
from picotrain.data import amounts, sources
from picotrain.data.folder import is_text
from picotrain.data.prepare import Say, silent
from picotrain.errors import ConfigError, DataError, Problem
from picotrain.places import expanded
from picotrain.planning.memory import facts, total_batch

AUTO_DATA_EPOCHS = 20.0  # data=auto takes the embedded corpus up to this many passes over it
COMPILE_FLOPS = 3e13  # a CPU run of more is compiled: about a minute of training, in which the compiler's time is won back
# Times the shards that the horizon needs. Other text has other bytes per token than the estimate (English: a tenth more), and the run
# should not reach the end of what is there.
SHARD_RESERVE = 1.25
ARCHIVED_SAVE_EVERY = 1000  # steps; an archive wants something to mirror


def resolve(config: Config, say: Say = silent) -> Config:
    """The config as `train` writes it; what is decided in words goes to `say`. A resolved config stays as it is. Raises DataError."""
    _check_cache_dir()
    open_choice = config.hardware.compile == "auto"
    config = decide(_with_absolute_paths(config))
    if open_choice and config.hardware.device == "cuda" and not config.hardware.compile:
        say(f"not compiled, which is slower: torch.compile needs {hardware.compiler_for_gpus()}")
    there = _existing(config)
    config = _set(config, "data", data=_with_shards(config, _data(config, there, say), there))
    if open_choice and config.train.num_train_epochs and config.hardware.device == "cpu":
        config = _set(config, "hardware", compile=_compile_pays(config, "cpu", True, _epoch_tokens(config)))
    if config.archive.url and config.train.save_every == -1:
        say(f"an archive is set: train.save_every={ARCHIVED_SAVE_EVERY}, so that there is something to mirror")
        config = _set(config, "train", save_every=ARCHIVED_SAVE_EVERY)
    name = config.run.name or run_name(config)
    config = _set(config, "run", name=name, dir=str(_run_dir(config, name)))
    _check_paths_are_text(config)
    _check_archive(config)
    return config


def _check_paths_are_text(config: Config) -> None:
    """config.yaml is text, and a path of other bytes cannot stand in it. Raises ConfigError."""
    run, coding = config.run, sys.getfilesystemencoding()
    paths = {"run.dir": run.dir, "run.cache_dir": run.cache_dir, "data.path": config.data.path, "tokenizer.path": config.tokenizer.path}
    hint = "another name" if coding == "utf-8" else "set PYTHONUTF8=1 or LC_ALL=C.UTF-8"
    rule = f"is a path that is not {coding} text, and config.yaml is text"
    if problems := [Problem(key, f"{path!a} {rule}", hint) for key, path in paths.items() if path and not is_text(path)]:
        raise ConfigError(problems)


def cache_dir(config: Config) -> Path:
    """Where corpora and tokenizers are kept: run.cache_dir, else $PICOTRAIN_CACHE, else ~/.cache/picotrain."""
    place = config.run.cache_dir or os.environ.get("PICOTRAIN_CACHE") or "~/.cache/picotrain"
    return expanded(place).absolute()


def _check_cache_dir() -> None:
    if wrong := places.flaw(os.environ.get("PICOTRAIN_CACHE") or "~", "local"):
        raise ConfigError([Problem("PICOTRAIN_CACHE", *wrong)])


def _check_archive(config: Config) -> None:
    """A run that is mirrored into itself would grow with every pass."""
    url, run_dir = config.archive.url, config.run.dir
    if url and run_dir and (how := places.overlap(url, Path(run_dir))):
        raise ConfigError([Problem("archive.url", f"{places.redacted(url)} {how}, {run_dir}", "a folder elsewhere, best on another disk")])


def _set(config: Config, section: str, data: DataConfig | None = None, **values: object) -> Config:
    return config.model_copy(update={section: data or getattr(config, section).model_copy(update=values)})


# Places ---------------------------------------------------------------------------------------------------


def _with_absolute_paths(config: Config) -> Config:
    """Every path means the same from every folder: a resume may come from another one."""
    if isinstance(config.data, DataConfig):
        config = _with_absolute_data(config)
    config = _set(config, "tokenizer", path=_absolute(config.tokenizer.path))
    config = _set(config, "archive", url=_absolute(config.archive.url))
    core = config.evaluation.core.model_copy(update={"bundle": _absolute(config.evaluation.core.bundle)})
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"core": core})})
    return _set(config, "run", cache_dir=str(cache_dir(config)))


def _with_absolute_data(config: Config) -> Config:
    mixture = tuple(entry.model_copy(update={"source": _absolute_source(entry.source)}) for entry in config.data.mixture)
    return _set(config, "data", path=_absolute(config.data.path), mixture=mixture)


def _absolute(path: str | None) -> str | None:
    return str(expanded(path).absolute()) if path and not places.is_url(path) else path


def _absolute_source(source: str) -> str:
    return source if source in sources.PRESETS else _absolute(source) or source


def _run_dir(config: Config, name: str) -> Path:
    return expanded(config.run.dir or Path("runs") / name).absolute()


def _existing(config: Config) -> DataConfig | None:
    """The data of the run that is there under this name; None without a name. A name made of this config's hash belongs to a run that was
    derived from the same words, so there is nothing to look up."""
    if not (config.run.dir or config.run.name):
        return None
    file = _run_dir(config, config.run.name or "") / "config.yaml"
    try:
        return load(file).data if file.is_file() else None
    except (ConfigError, OSError):  # whoever opens the run says what is wrong with it
        return None


# Hardware -------------------------------------------------------------------------------------------------


def decide(config: Config) -> Config:
    """Replace every `auto` and null that the machine decides. Only what is left open asks the machine."""
    hw, train = config.hardware, config.train
    machine = hardware.cpu() if hw.device == "cpu" else hardware.detect()
    device = machine.device if hw.device == "auto" else hw.device
    known = machine if machine.device == device else None  # planning for hardware that is not here
    nproc = (known.count if known else 1) if hw.nproc_per_node == "auto" else hw.nproc_per_node
    name = hw.name or (known.name if known else device)
    fast_bf16 = known.fast_bf16 if known and not hw.name else device == "cuda"
    use_compile = _compile_pays(config, device, known is not None) if hw.compile == "auto" else hw.compile
    return config.model_copy(
        update={
            "hardware": hw.model_copy(
                update={
                    "device": device,
                    "nproc_per_node": nproc,
                    "name": name,
                    "memory_bytes": hw.memory_bytes or (known.memory_bytes if known else None),
                    "threads": hw.threads or max(1, hardware.cores() // nproc),
                    "compile": use_compile,
                }
            ),
            "train": train.model_copy(
                update={
                    "seq_len": train.seq_len or shape.default_seq_len(config.model.depth),
                    "precision": ("bf16" if fast_bf16 else "fp32") if train.precision == "auto" else train.precision,
                }
            ),
        }
    )


def _compile_pays(config: Config, device: str, is_here: bool, epoch_tokens: float | None = None) -> bool:
    """Always on a GPU, unless the GPU is here and a compiler is not. On a CPU where there is a C++ compiler and the run is long enough to
    win back what compiling takes (docs/log.md, 2026-11-25)."""
    if device != "cpu":
        return device == "cuda" and not (is_here and hardware.compiler_for_gpus())
    return hardware.has_compiler() and horizon_tokens(config, epoch_tokens)[0] * facts(config)[3] > COMPILE_FLOPS


def _epoch_tokens(config: Config) -> float | None:
    """About how many tokens one pass over the data has; None: not known before something was fetched."""
    try:
        found = [amount.text_bytes for amount in amounts.estimate(config.data, cache_dir(config))]
    except DataError:  # whoever opens the data says what is wrong with it
        return None
    if None in found:
        return None
    return sum(text_bytes or 0 for text_bytes in found) / estimate_bytes_per_token(config.tokenizer.vocab_size)


# The horizon ----------------------------------------------------------------------------------------------


def estimate_bytes_per_token(vocab_size: int) -> float:
    """Bytes a token stands for, before a tokenizer is there: 3.85 at 8,192 and 4.31 at 32,768, measured on Python source."""
    return 3.85 + 0.23 * math.log2(vocab_size / 8192)


def horizon_tokens(config: Config, corpus_tokens: float | None) -> tuple[int, str]:
    """Training tokens and the key that set them. Epochs of an unknown corpus count as if it had no end: 0 tokens."""
    _, params, _, flops = facts(config)
    train = config.train
    batch = total_batch(config, params)
    if train.max_steps:
        return train.max_steps * batch, "train.max_steps"
    if train.num_train_epochs:
        return round(train.num_train_epochs * (corpus_tokens or 0)), "train.num_train_epochs"
    if train.target_tokens:
        return train.target_tokens, "train.target_tokens"
    if train.target_flops:
        return int(train.target_flops / flops), "train.target_flops"
    ratio = train.target_param_data_ratio or shape.DEFAULT_RATIO
    return round(ratio * params.scaling), "train.target_param_data_ratio"


# Data -----------------------------------------------------------------------------------------------------


def _data(config: Config, there: DataConfig | None, say: Say) -> DataConfig:
    """The data section with data=auto decided: as in the run that is there, else by device and horizon. What was typed stays."""
    if config.data.kind != "auto":
        return config.data
    if there and there.name in ("pystdlib", "climbmix"):
        choice = there.name
        say(f"data=auto is {choice}, as in the run that is there")
    else:
        choice, reason = choose_data(config, amounts.pystdlib_text_bytes())
        say(reason)
    auto = data_preset("auto")
    typed = {key: value for key, value in config.data if value != getattr(auto, key) and (key, choice) != ("num_shards", "pystdlib")}
    return DataConfig.model_validate(data_preset(choice).model_dump() | typed)


def choose_data(config: Config, pystdlib_bytes: int) -> tuple[str, str]:
    """What data=auto means for a config whose device is decided: (group choice, the reason in words)."""
    if config.train.num_train_epochs:
        return "pystdlib", "data=auto is pystdlib: a horizon in epochs names no amount of text"
    tokens = horizon_tokens(config, None)[0]
    epochs = tokens / (pystdlib_bytes / estimate_bytes_per_token(config.tokenizer.vocab_size))
    fact = f"the horizon of {tokens:,} tokens is {epochs:.1f} passes over the embedded standard library"
    if epochs <= AUTO_DATA_EPOCHS:
        return "pystdlib", f"data=auto is pystdlib: {fact} (at most {AUTO_DATA_EPOCHS:.0f})"
    if config.hardware.device == "cpu":
        return "pystdlib", f"data=auto is pystdlib: {fact}, but without a GPU only a corpus that is named is downloaded (data=climbmix)"
    return "climbmix", f"data=auto is climbmix: {fact}, more than {AUTO_DATA_EPOCHS:.0f}"


def _with_shards(config: Config, data: DataConfig, there: DataConfig | None) -> DataConfig:
    """The data with a number of shards for each corpus on the Hub: as typed, as in the run that is there, or what the horizon needs."""
    if data.kind == "hub" and data.num_shards is None:
        kept = there.num_shards if there and there.kind == "hub" and there.repo_id == data.repo_id else None
        return data.model_copy(update={"num_shards": kept or _shards_needed(config, data, 1.0)})
    if data.kind != "mixture":
        return data
    kept_by = {entry.source: entry.num_shards for entry in there.mixture} if there else {}
    entries = []
    for entry, part in zip(data.mixture, sources.parts_of(data), strict=True):
        if part.kind == "hub" and entry.num_shards is None:
            number = kept_by.get(entry.source) or _shards_needed(config, part, _largest_share(entry, data.mixture))
            entry = entry.model_copy(update={"num_shards": number})
        entries.append(entry)
    return data.model_copy(update={"mixture": tuple(entries)})


def _shards_needed(config: Config, data: DataConfig, share: float) -> int:
    """Training shards for `share` of the horizon's tokens in less than one epoch, with a reserve; at most all. A horizon in epochs counts
    passes over all."""
    assert data.max_shards and data.shard_text_bytes  # the schema's business
    most = data.max_shards - 1
    if config.train.num_train_epochs:
        return most
    batch = total_batch(config, facts(config)[1])
    tokens = math.ceil(horizon_tokens(config, None)[0] / batch) * batch
    text_bytes = tokens * share * estimate_bytes_per_token(config.tokenizer.vocab_size)
    return min(most, max(1, math.ceil(SHARD_RESERVE * text_bytes / data.shard_text_bytes)))


def _largest_share(entry: MixtureSource, mixture: tuple[MixtureSource, ...]) -> float:
    """An entry's share of the rows once all others that leave have left."""
    return entry.weight / sum(other.weight for other in mixture if other is entry or other.at_end == "wrap")
