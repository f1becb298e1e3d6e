"""A run's directory: created from a config, or opened again to go on. Everything the workers read stands in it.

config.yaml, plan.json, data.json, tokenizer.json    what is trained, on what
overrides.txt, environment.json, attempts/0001/      how it came about, once more for every start
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from picotrain import __version__, checkout, hardware, planning
from picotrain.config import Config, dump, load, places
from picotrain.config.identity import classify_change, diff
from picotrain.data import amounts, counts, sources, tokenizers
from picotrain.data import recorded as recorded_data
from picotrain.data.mixture import Mixture
from picotrain.disk import is_own_json, parse_json, read_plain, write_json, write_whole
from picotrain.errors import ConfigError, DataError, Problem, RunError
from picotrain.planning import Plan, fp8, repeats
from picotrain.planning.resolve import cache_dir
from picotrain.planning.resolve import resolve as resolve

if TYPE_CHECKING:
    from picotrain.evaluation.bundle import Bundle
    from picotrain.tokenizer import Tokenizer

Say = Callable[[str], None]

# Values derived once: a resumed run reads them back instead of deriving them anew.
DERIVED_ONCE = (
    "num_steps", "total_tokens", "horizon", "matrix_lr", "embed_lr", "head_lr", "scalar_lr", "weight_decay", "bytes_per_token", "epochs",
)  # fmt: skip
CHOSEN_ONCE = ("attention", "window_attention")  # by a first start on this hardware
# Numbers of a plan that something is divided by or as many of which are made.
COUNTED = (
    "depth", "width", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "seq_len", "total_batch_size", "rows_per_step",
    "device_batch_size", "grad_accum_steps", "dp_size", "world_size", "num_steps", "total_tokens", "lanes", "unit_bytes",
    "bytes_per_token", "eval_rows",
)  # fmt: skip
# What a start writes, config.yaml last: it may be killed in between.
WRITTEN = ("attempts", "tokenizer.json", "data.json", "environment.json", "plan.json", "overrides.txt", "config.yaml")
WHOLE = {"texts": "whole"}  # in data.json: what cuts, pads or draws in a tokenizer.json was off
SAMPLE_BYTES = 1_000_000  # of text that a plan measures a tokenizer on
OWN_KEYS = {"data.json": ("corpus", "tokenizer"), "environment.json": ("picotrain",), "plan.json": ("num_steps",)}  # what tells them
# Files of a run in whose places a folder would fail or mislead whatever reads or writes them.
FILES = {
    *WRITTEN[1:], "metrics.jsonl", "summary.json", "report.md", "report.html", "loss.png", "course.png", "core.png", "latest", "best",
    "metrics.json", "state.json", "manifest.json", "results.json", "results.md", "core.csv", "predictions.jsonl",
}  # fmt: skip
PACKAGES = ("torch", "numpy", "pyarrow", "safetensors", "tokenizers", "gigatoken", "hydra-core", "pydantic", "huggingface_hub", "torchao")


class Material(NamedTuple):
    """What a config needs to train: corpus, tokenizer, and the plan that follows from both."""

    config: Config
    plan: Plan
    corpus: Mixture
    tokenizer: Tokenizer


def gather(config: Config, say: Say) -> Material:
    """Prepare corpus and tokenizer of a resolved config, downloading and training what is not in the cache yet."""
    cache = cache_dir(config)
    corpus, on_bad = sources.gather(config.data, cache, say), sources.passing_over(config.data, say)
    path, measured = tokenizers.obtain_tokenizer(config.tokenizer, corpus, cache, say, on_bad)
    tokenizer = tokenizers.tokenizer_of(path, config.tokenizer)
    for change in tokenizer.changes:
        say(change)
    plan = planning.make(config, config.run.name or "", corpus, measured["bytes_per_token"])  # its problems come before any counting
    tokenizers.check_rows(corpus, tokenizer, plan.seq_len, plan.unit_bytes, on_bad)
    corpus = _counted(config, corpus, tokenizer, plan, say)
    plan = planning.make(config, config.run.name or "", corpus, measured["bytes_per_token"])
    return Material(config, plan, corpus, tokenizer)


def _counted(config: Config, corpus: Mixture, tokenizer: Tokenizer, plan: Plan, say: Say) -> Mixture:
    """The corpus with the rows of an epoch, where they can be counted in seconds."""
    try:
        return counts.count(
            corpus, tokenizer, tokenizer.fingerprint, plan.seq_len, plan.unit_bytes, config.run.seed, cache_dir(config), say
        )
    except DataError as error:
        if config.data.on_bad_shard == "stop":
            raise DataError(counts.unreadable(error)) from error
        say(f"WARNING: the length of an epoch is estimated, since the text cannot be counted: {error}")
        return corpus


def preview(config: Config) -> Plan:
    """The plan of a resolved config as far as it can be told without preparing, downloading or training anything.

    Raises ConfigError with all problems, those of a tokenizer that tokenizer.path names included, and DataError for text that is none.
    """
    name, cache = config.run.name or "", cache_dir(config)
    named: list[Tokenizer | None] = []
    all_problems(lambda: named.append(tokenizers.named_tokenizer(config.tokenizer)), lambda: planning.make(config, name))
    corpus = sources.known_mixture(config.data, cache)
    measured = tokenizers.known_tokenizer(config.tokenizer, corpus, cache) if corpus else None
    per_token: float | None = measured["bytes_per_token"] if measured else None
    if per_token is None and named[0]:
        texts = list(corpus.sample(SAMPLE_BYTES)) if corpus and not _is_remote(corpus) else amounts.sample(config.data, SAMPLE_BYTES)
        per_token = tokenizers.bytes_per_token(named[0], texts) if texts else None
    guess = () if corpus else amounts.estimate(config.data, cache)
    plan = planning.make(config, name, corpus, per_token, guess)
    if corpus and measured:  # as far as an earlier start has counted the rows of an epoch
        counted = counts.known(corpus, measured["tokenizer"], plan.seq_len, plan.unit_bytes, config.run.seed, cache)
        plan = planning.make(config, name, counted, per_token) if counted != corpus else plan
    return plan


def _is_remote(corpus: Mixture) -> bool:
    return any(part.remote for part in corpus.corpora)


def open_bundle(config: Config, say: Say = lambda text: None) -> Bundle:
    """The evaluation bundle of a resolved config that names one, from the cache where it is a URL. Raises DataError."""
    from picotrain.evaluation import bundle, fetch

    section = config.evaluation.core
    place = section.bundle or ""
    folder = fetch.fetch(place, section.sha256 or "", cache_dir(config), say) if places.is_url(place) else Path(place)
    return bundle.read_bundle(folder, section.baseline_table)


def is_finished(run_dir: Path, num_steps: int) -> bool:
    """Whether the run has reported the end of `num_steps` steps."""
    try:
        summary = parse_json(read_plain(run_dir / "summary.json"))
        return summary["status"] == "finished" and summary["steps_done"] >= num_steps
    except (OSError, ValueError, KeyError, TypeError):
        return False


def open_run(config: Config, overrides: Sequence[str], say: Say) -> Material | None:
    """Create the run directory of a resolved config, or open the one that is there, and give what stands in it; the caller holds its lock.
    None: the run is finished, and nothing was changed.

    Raises RunError when the directory holds another experiment, naming the keys that differ, or may not be resumed.
    """
    run_dir = Path(config.run.dir or "")
    is_there = (run_dir / "config.yaml").exists()
    all_problems(
        lambda: check_machine(config),
        lambda: planning.make(config, run_dir.name),
        lambda: None if is_there else tokenizers.named_tokenizer(config.tokenizer),  # a run has its own
        lambda: _check_trackers(config.logger.trackers),
        lambda: _check_packages(config),
    )
    if config.archive.url:
        from picotrain.checkpoint import archive  # brings torch

        archive.check(config.archive.url, run_dir)  # before anything long begins
    warned = False
    if is_there:
        material = _reopen(run_dir, config, say)
    else:
        check_places(run_dir)
        if not _is_new(run_dir):
            raise RunError(f"{run_dir} is no run and not empty; another run.dir or run.name would be right")
        warned = _foretell(config, say)
        material = gather(config, say)
    if is_finished(run_dir, material.plan.num_steps):
        return None
    if config.evaluation.core.bundle and config.train.core_metric_every > 0:
        for task in open_bundle(config, say).tasks:  # what is wrong with it is said now and not after hours
            if task.problem:
                say(f"WARNING: CORE will lack a task: {task.problem}")
    create(run_dir, material, overrides)
    repeated = repeats.warnings(material.plan) if warned else []
    for note in material.plan.notes:
        if note not in repeated:
            say(note)
    return material


def _foretell(config: Config, say: Say) -> bool:
    """Say whose text it is, and warn of too many passes over it, before it is downloaded or prepared; whether there was a warning."""
    early = preview(config)
    for name, licence in early.licences.items():
        say(f"licence of {name}: {licence}")
    warnings = repeats.warnings(early)
    for warning in warnings:
        say(warning)
    return bool(warnings)


def _is_new(run_dir: Path) -> bool:
    """Whether a run can be created here: nothing is there but what a start leaves that was killed while it created it."""
    there = {path.name for path in run_dir.iterdir()} - {".lock"} if run_dir.is_dir() else set()
    if not there:
        return True
    attempts = run_dir / "attempts"
    begun = attempts.is_dir() and all(re.fullmatch("[0-9]{4,}", path.name) for path in attempts.iterdir())
    own = all(is_own_json(run_dir / name, *keys) for name, keys in OWN_KEYS.items())
    return begun and own and there <= {*WRITTEN, *(f".{name}.tmp" for name in WRITTEN)}


def read_material(run_dir: Path) -> Material:
    """A run's config, plan, corpus and tokenizer, from its own files."""
    from picotrain.tokenizer import load_tokenizer

    require_run(run_dir)
    config, plan = load(run_dir / "config.yaml"), read_plan(run_dir)
    corpus = _read_data(run_dir)[0]
    tokenizer = load_tokenizer(run_dir / "tokenizer.json", config.tokenizer.encoder)
    for key, planned, found in (("seq_len", plan.seq_len, config.train.seq_len), ("vocab_size", plan.vocab_size, tokenizer.vocab_size)):
        if planned != found:
            raise RunError(f"{run_dir / 'plan.json'}: {key} is {planned:,}, and {found} in the files beside it; they are not of one run")
    return Material(config, plan, corpus, tokenizer)


def read_plan(run_dir: Path) -> Plan:
    """A run's plan. Raises RunError for one that is damaged or holds what no plan can."""
    path = run_dir / "plan.json"
    try:
        plan = Plan.model_validate(parse_json(read_plain(path)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RunError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}, not {first['input']!r:.60}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    numbers = {key: value for key, value in plan if isinstance(value, int | float)}
    numbers |= {f"{part}.{key}": value for part in ("parameters", "sources") for key, value in getattr(plan, part).items()}
    for key, value in numbers.items():
        least, most = (0.01, 2**53) if key in COUNTED else (0, 1e30)
        if not least <= value <= most:
            raise RunError(f"{path} is damaged: {key} is {str(value)[:40]}, which no plan can hold")
    return plan


def _read_data(run_dir: Path) -> tuple[Mixture, dict[str, str], bool]:
    """A run's corpus, the fingerprints of it and of the tokenizer, and whether the tokenizer encoded texts whole whatever its file says.
    Raises RunError for a data.json that is damaged."""
    path = run_dir / "data.json"
    try:
        data = parse_json(read_plain(path))
        prints = {what: str(data[what]["fingerprint"]) for what in ("corpus", "tokenizer")}
        mixture = Mixture.from_json(data["corpus"])
        if not mixture.sources or not all(math.isfinite(share) and share > 0 for share in mixture.shares):
            raise ValueError("a mixture's weights must be positive")
        # Earlier versions left truncation, padding and dropout on; gigatoken knows none of them.
        whole = WHOLE.items() <= data["tokenizer"].items() or data["tokenizer"].get("encoder") != "tokenizers"
        return mixture, prints, whole
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    except (DataError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise RunError(f"{path} is damaged: {f'it has no {error}' if isinstance(error, KeyError) else error}") from error


def check_places(run_dir: Path) -> None:
    """Raise RunError where something in a run directory would lead a reader or writer out of it, or make one wait."""
    home = os.path.realpath(run_dir)
    for folder, folders, files in os.walk(run_dir):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            try:
                mode = os.lstat(path).st_mode
            except FileNotFoundError:  # another rank has just removed it
                continue
            if stat.S_ISLNK(mode):
                if not os.path.realpath(path).startswith(home + os.sep):
                    raise RunError(f"{path} is a symlink out of the run; put in its place what it leads to")
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise RunError(f"{path} is neither a file nor a folder; remove it")
            elif stat.S_ISDIR(mode) and name in FILES and os.path.relpath(folder, run_dir).split(os.sep)[0] in (".", "checkpoints", "eval"):
                raise RunError(f"{path} is a folder, where a run has a file; move it away")


def require_run(run_dir: Path) -> None:
    """Raise RunError unless the folder is a run's, naming runs that may be meant, and nothing in it leads out of it."""
    if (run_dir / "config.yaml").is_file():
        return check_places(run_dir)
    places = {"runs there": run_dir.parent, "runs in it": run_dir, "runs in runs/": Path("runs")}
    found = (
        (what, sorted(path.parent.name for path in place.glob("*/plan.json") if (path.parent / "config.yaml").is_file()))
        for what, place in places.items()
    )
    there = next((f"; {what}: {', '.join(names[:8])}" for what, names in found if names), "")
    raise RunError(f"{run_dir} holds no run (no config.yaml){there}")


def _check_trackers(names: Sequence[str]) -> None:
    from picotrain.monitor import missing_trackers

    if problems := missing_trackers(names):
        raise ConfigError(problems)


def _check_packages(config: Config) -> None:
    if problems := places.missing_packages(config.model_dump()):
        raise ConfigError(problems)


def _reopen(run_dir: Path, config: Config, say: Say) -> Material:
    """The material of an existing run under a config that may differ from its own in what may change."""
    require_run(run_dir)
    before, old_plan = load(run_dir / "config.yaml"), read_plan(run_dir)
    if config.run.resume == "never":
        raise RunError(f"{run_dir} holds a run already and run.resume=never; another run.dir or run.name would be right")
    changes = {key: (old, new) for key, old, new in diff(before, config)}
    kinds = {key: classify_change(key) for key in changes}
    if refused := [key for key, kind in kinds.items() if kind == "refused"]:
        lines = "\n".join(f"  - {key}: {changes[key][0]!r} there, {changes[key][1]!r} asked for" for key in refused)
        raise RunError(f"{run_dir} holds another experiment; these keys differ:\n{lines}\nanother run.dir or run.name would be right")
    announced = [key for key, kind in kinds.items() if kind == "announced"]
    for key in announced:
        say(f"this continues a changed experiment: {key} was {changes[key][0]!r}, is {changes[key][1]!r}")
    if rounding := [key for key, kind in kinds.items() if kind == "rounding"]:
        say(f"the rows stay the same, rounding may differ from before: {', '.join(rounding)} changed")

    pinned = config.model_copy(
        update={
            "train": config.train.model_copy(update={"total_batch_size": old_plan.total_batch_size}),
            "data": config.data.model_copy(update={"lanes": old_plan.lanes, "unit_bytes": old_plan.unit_bytes}),
        }
    )
    corpus, tokenizer = _same_data(run_dir, pinned, config.tokenizer.path != before.tokenizer.path, say)
    plan = planning.make(pinned, config.run.name or "", corpus, old_plan.bytes_per_token)
    kept = {"sharing": old_plan.sharing} | ({} if announced else {key: getattr(old_plan, key) for key in DERIVED_ONCE})
    if config.train.device_batch_size == "auto" and (plan.hardware_name, plan.world_size) == (old_plan.hardware_name, old_plan.world_size):
        kept |= {"device_batch_size": old_plan.device_batch_size, "grad_accum_steps": old_plan.grad_accum_steps}  # what has fitted
    if plan.hardware_name == old_plan.hardware_name:
        kept |= {key: getattr(old_plan, key) for key in CHOSEN_ONCE if getattr(plan, key) == "auto"}  # what has worked
    return Material(config, plan.model_copy(update=kept), corpus, tokenizer)


def _same_data(run_dir: Path, config: Config, other_tokenizer: bool, say: Say) -> tuple[Mixture, Tokenizer]:
    """The corpus as it is now and the run's own tokenizer. Raises RunError where either is not what the run began with."""
    from picotrain.tokenizer import load_tokenizer

    before, recorded, whole = _read_data(run_dir)
    try:
        corpus = recorded_data.reopen(config.data, before, cache_dir(config), say)
    except recorded_data.Differs as error:
        raise RunError(
            f"{run_dir}: the corpus is not the one this run was started with; a resume would train on something else:\n{error}\n"
            f"put back what it was, or pass over training shards that are missing or changed, and over new ones: "
            f"picotrain resume {run_dir} data.on_bad_shard=skip"
        ) from None
    tokenizer = load_tokenizer(run_dir / "tokenizer.json", config.tokenizer.encoder)
    named = tokenizer
    if other_tokenizer and config.tokenizer.path:
        named = load_tokenizer(Path(config.tokenizer.path), config.tokenizer.encoder)
    for what, now in (("corpus", corpus.fingerprint), ("tokenizer", tokenizer.fingerprint), ("tokenizer", named.fingerprint)):
        if recorded[what] != now:
            raise RunError(f"{run_dir}: the {what} is not the one this run was started with; a resume would train on something else")
    if not whole and tokenizer.switched_off:
        raise RunError(
            f"{run_dir} was started by a version of picotrain that left {tokenizer.switched_off} on, as its tokenizer.json says; this one "
            "encodes every text whole, and a resume would train on something else. A new run is right, or the version that "
            "environment.json names"
        )
    # How the lanes share an epoch stays as it was when the run was created.
    kept = zip(corpus.sources, before.sources, strict=True)
    return replace(corpus, sources=tuple(replace(source, rows=old.rows) for source, old in kept)), tokenizer


def create(run_dir: Path, material: Material, overrides: Sequence[str]) -> None:
    """Everything the workers and a later reader need; config.yaml last, since it is what makes the folder a run."""
    from picotrain.tokenizer import without_bom

    try:
        attempts = run_dir / "attempts"
        attempts.mkdir(parents=True, exist_ok=True)
        begun = sorted(attempts.iterdir())
        if begun and not (begun[-1] / "config.yaml").is_file():
            begun.pop()  # killed while it was written: this start takes its place, and writes over what it left
        attempt = attempts / f"{len(begun) + 1:04d}"
        attempt.mkdir(exist_ok=True)
        tokenizer = material.tokenizer
        if tokenizer.path != run_dir / "tokenizer.json":
            (run_dir / "tokenizer.json").write_bytes(without_bom(tokenizer.path.read_bytes()))  # what others read has none
        described = {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "encoder": tokenizer.encoder, **WHOLE}
        write_json(run_dir / "data.json", {"corpus": material.corpus.to_json(), "tokenizer": described})
        write_json(run_dir / "environment.json", environment(material.config))
        material.plan.save(run_dir / "plan.json")
        for folder in (attempt, run_dir):
            write_whole(folder / "overrides.txt", "".join(f"{line}\n" for line in overrides))
            write_whole(folder / "config.yaml", dump(material.config))
    except OSError as error:
        raise RunError(f"{run_dir} cannot be written: {error.strerror or error}") from error


def check_machine(config: Config) -> None:
    """Raise ConfigError when this machine lacks what the config asks for. For commands that train; planning needs no GPU."""
    hw = config.hardware
    problems = []
    machine = hardware.cpu() if hw.device == "cpu" else hardware.detect()
    if hw.device != machine.device:
        problems.append(
            Problem("hardware.device", f"{hw.device} is not here: this machine has {machine.name}", f"hardware={machine.device}")
        )
    elif hw.device == "cuda" and int(hw.nproc_per_node) > machine.count:
        problems.append(
            Problem("hardware.nproc_per_node", f"{hw.nproc_per_node} processes, but {machine.count} GPUs", f"at most {machine.count}")
        )
    elif hw.device == "mps" and int(hw.nproc_per_node) > 1:
        problems.append(Problem("hardware.nproc_per_node", "several processes cannot share Apple's GPU", "1"))
    elif config.train.precision == "fp8" and hw.device == "cuda":
        problems += fp8.device_problems("cuda", machine.name, machine.compute_capability)
        if importlib.util.find_spec("torchao") is None:
            problems.append(
                Problem("train.precision", "fp8 needs the package torchao, which is not installed", "pip install 'picotrain[fp8]'")
            )
    if hw.device == "cuda" and not problems:
        from picotrain import parallel  # torch itself, before anything is downloaded or prepared for it

        message, hint = parallel.unusable_gpus(machine.name, machine.compute_capability)
        if message:
            problems.append(Problem("hardware.device", message, hint))
        if hw.compile and (lacks := hardware.compiler_for_gpus()):
            problems.append(Problem("hardware.compile", f"torch.compile needs {lacks} for a GPU", "false"))
    if hw.device == "cpu" and hw.compile and not hardware.has_compiler():
        problems.append(Problem("hardware.compile", "torch.compile needs a C++ compiler on a CPU and none was found", "false"))
    if problems:
        raise ConfigError(problems)


def environment(config: Config) -> dict[str, Any]:
    """Versions, the commit and hardware, and nothing that could hold a secret (no environment variables)."""
    source = checkout.state()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "picotrain": __version__,
        "commit": source and source.commit,  # null: an installed package
        "dirty": source and source.dirty,
        "packages": {name: _version(name) for name in PACKAGES},
        "hardware": {
            "name": config.hardware.name,
            "device": config.hardware.device,
            "threads": config.hardware.threads,
            "waiting": hardware.waiting(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def all_problems(*checks: Callable[[], object]) -> None:
    """Run every check and raise the problems of all ConfigErrors as one, each once; any other user error is raised as it is."""
    problems: list[Problem] = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ConfigError(problems)
