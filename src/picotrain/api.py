"""picotrain from Python: what the commands do, as functions. docs/api.md shows them, and a notebook uses them.

    config = picotrain.compose("model=d2", "hardware=cpu", "train.max_steps=50")
    trained = picotrain.train(config)
    model, tokenizer = picotrain.load(trained.run)
    print(picotrain.generate(model, tokenizer, "def main"))

Mistakes raise PicotrainError with the message that the command would print. Lines for the user go to the logger "picotrain".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from picotrain import run as runs
from picotrain import shape
from picotrain.config import Config
from picotrain.config import compose as _compose
from picotrain.config.schema import SamplingConfig
from picotrain.config.validate import validate
from picotrain.disk import read_json
from picotrain.errors import ConfigError, PicotrainError, Problem, RunError, Stopped
from picotrain.planning import Plan
from picotrain.terminal import say

if TYPE_CHECKING:
    from torch import nn

    from picotrain.model import LanguageModel
    from picotrain.tokenizer import Tokenizer
    from picotrain.worker import Opened

__all__ = [
    "Config", "ConfigError", "Loaded", "PicotrainError", "Plan", "Trained", "compose", "evaluate", "generate", "load", "plan", "train",
]  # fmt: skip


def compose(*overrides: str, config_dir: str | Path | None = None, config_file: str | Path | None = None) -> Config:
    """The config of `group=choice` and `dotted.key=value` words, as they are typed after `picotrain train`.

    config_dir: a folder with more choices for the groups. config_file: a saved config to start from instead of the groups.
    Raises ConfigError with all problems at once.
    """
    return _compose(overrides, Path(config_dir) if config_dir else None, Path(config_file) if config_file else None)


def plan(config: Config) -> Plan:
    """What a config means: steps, batch arithmetic, memory, and time as far as figures are known. Nothing is prepared or downloaded."""
    return runs.preview(runs.resolve(config, say))


@dataclass(frozen=True)
class Trained:
    """How a training ended."""

    run: Path  # the run directory
    status: Literal["finished", "stopped"]
    step: int  # updates done
    summary: dict[str, Any]  # what summary.json says: final_val_bpb, best_val_bpb, smooth_train_loss, ...


def train(config: Config, model: nn.Module | None = None) -> Trained:
    """Train what the config says, or go on with its run, as `picotrain train` does: in this process, or in several that are started and
    waited for where hardware.nproc_per_node says so. A signal (Ctrl-C) saves and ends it: then the status is "stopped".

    model: a module of your own instead of the one that the config names, see `picotrain.model.adapted`; trained in this process, from the
    weights that it has. Raises PicotrainError.
    """
    from picotrain.launch import Start, launch

    config = runs.resolve(config if model is None else _with_module(config, model), say)
    code = _train_here(config, model) if model is not None else launch(lambda: Start(config, lambda meeting: _opened(config)))
    run_dir = Path(config.run.dir or "")
    if code not in (0, Stopped.exit_code):
        raise RunError(f"{run_dir}: training ended with exit code {code}; the worker that failed has said why")
    summary = read_json(run_dir / "summary.json")
    return Trained(run_dir, "finished" if code == 0 else "stopped", summary["steps_done"], summary)


@contextmanager
def _opened(config: Config) -> Generator[Opened | None]:
    """The config's run, created or opened again, under its lock; None when it is finished."""
    from picotrain.lock import RunLock
    from picotrain.worker import Opened

    run_dir = Path(config.run.dir or "")
    with RunLock(run_dir):
        material = runs.open_run(config, [], say)
        yield Opened(run_dir, material) if material else None


def _train_here(config: Config, module: nn.Module) -> int:
    """Train a module of the user's own in this process; the exit code."""
    from picotrain import worker
    from picotrain.model import adapted, compute_dtype

    with _opened(config) as found:
        if found is None or found.material is None:
            return 0
        made = found.material.plan
        model = adapted(module, made.vocab_size, made.seq_len, compute_dtype(made.precision))
        return worker.run(found.dir, found.material, model=model)


class Loaded(NamedTuple):
    """A model in evaluation mode, and its tokenizer."""

    model: LanguageModel
    tokenizer: Tokenizer


def load(run: str | Path, checkpoint: str = "best", model: nn.Module | None = None) -> Loaded:
    """The model of a run's checkpoint, verified, in evaluation mode on the run's device (or the CPU, where that device is not here).

    checkpoint: "best" (lowest validation BPB), "last", a step or a folder's name. model: the module to fill, for a run that trains one
    given from Python. Raises RunError, CheckpointError.
    """
    material, built, _ = load_model(Path(run), checkpoint, model)
    return Loaded(built, material.tokenizer)


def evaluate(run: str | Path, checkpoint: str = "best", tokens: int | None = None, model: nn.Module | None = None) -> dict[str, Any]:
    """{"step", "val_bpb", "val_loss", "tokens"} of a checkpoint on the run's validation text, and {"core_metric", "core"} where the run
    names an evaluation bundle. tokens: at most so many; None: the whole validation shard. Writes nothing; `picotrain eval` does.
    """
    from picotrain import evaluation
    from picotrain.data.stream import validation_rows
    from picotrain.evaluation.suite import core_of_model
    from picotrain.parallel import Parallel

    material, built, path = load_model(Path(run), checkpoint, model)
    config, made, corpus, tokenizer = material
    ranks = Parallel.single(str(built.device))
    most = None if tokens is None else max(1, tokens // made.seq_len)
    rows = evaluation.Rows(validation_rows(corpus, tokenizer, made.seq_len, most, made.unit_bytes).rows)
    batch = config.evaluation.bpb.device_batch_size or made.device_batch_size
    found = evaluation.bits_per_byte(built, lambda: rows, tokenizer.token_bytes(), batch, ranks)
    assert found is not None, "nobody stops it"
    results = {"step": int(path.name.removeprefix("step_")), "val_bpb": found[0].val_bpb, "val_loss": found[0].val_loss}
    results["tokens"] = found[0].tokens
    if config.evaluation.core.bundle:
        most_of_task = config.train.core_metric_max_per_task
        core = core_of_model(
            built, tokenizer, lambda: runs.open_bundle(config, say), most_of_task, ranks, lambda: False, lambda task, done, total: None
        )
        assert core is not None
        results |= {"core_metric": core.core_metric, "core": core.tasks}
    return results


def generate(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str = "", max_tokens: int = 64, temperature: float = 0.8,
    top_k: int | None = 50, seed: int = 0,
) -> str:  # fmt: skip
    """What the model writes after the prompt, which is not repeated. temperature 0: the likeliest token; top_k None: among all."""
    from picotrain.sampling import stream_text

    options = SamplingConfig(max_tokens=max_tokens, temperature=temperature, top_k=top_k)
    return "".join(stream_text(model, tokenizer, prompt, options, seed))


def load_model(run: Path, which: str, module: nn.Module | None = None) -> tuple[runs.Material, LanguageModel, Path]:
    """A run's material, its model with a checkpoint's weights, verified, in evaluation mode on the run's device, and the checkpoint's
    folder; on that of this rank where torchrun has started several, and nothing on another's."""
    from picotrain import checkpoint, hardware, parallel
    from picotrain.model import adapted, compute_dtype
    from picotrain.state import load_model_tensors
    from picotrain.worker import set_up_process

    material = runs.read_material(run)
    made = material.plan
    here = made.device in ("cpu", hardware.detect().device)  # a run of a GPU node can be looked at on a laptop
    device = made.device if here else "cpu"
    set_up_process(material.config.hardware.model_copy(update={"device": device, "threads": None}))  # this machine's, shared by its ranks
    path = checkpoint.find(run / "checkpoints", which)
    checkpoint.verify(path)
    dtype = compute_dtype(made.precision if here else "fp32")
    if module is None:
        model = material.config.model.build(made.vocab_size, made.seq_len, dtype)
    else:
        model = adapted(module, made.vocab_size, made.seq_len, dtype)
    load_model_tensors(model, checkpoint.load_tensors(path, "model"))
    return material, model.to(parallel.place(device)).eval(), path


def _with_module(config: Config, module: nn.Module) -> Config:
    """The config with a `model` section that counts this module's parameters. Raises ConfigError for a module that is no language
    model, and for more than one process."""
    import torch

    from picotrain.model import adapted, flaw

    problems, vocab_size, seq_len = [], config.tokenizer.vocab_size, config.train.seq_len or shape.default_seq_len(1)
    try:
        wrong = flaw(module, vocab_size, seq_len)
    except IndexError as error:  # an embedding that is too small says it so
        wrong = f"cannot take every id below tokenizer.vocab_size={vocab_size:,}: {error}"
    if wrong:
        problems.append(Problem("model", f"the module {type(module).__name__} {wrong}", "docs/api.md says what a module has to do"))
    if config.hardware.nproc_per_node not in ("auto", 1) or config.launch.nnodes > 1:
        rule = "a model given from Python trains in this process alone"
        problems.append(Problem("hardware.nproc_per_node", rule, "1, or register the model as a part: docs/extending.md"))
    if problems:
        raise ConfigError(problems)
    model = adapted(module, vocab_size, seq_len, torch.float32)
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[model.group_of(name, parameter)] += parameter.numel()
    widths = [parameter.size(-1) for parameter in model.parameters() if parameter.dim() == 2]
    section = {
        "kind": "module", "name": type(module).__name__, "width": min(widths, default=1), "embedding": counts["embed"],
        "matrices": counts["matrices"], "head": counts["head"], "scalars": counts["scalars"],
    }  # fmt: skip
    tree = config.model_dump() | {"model": section}
    tree["hardware"] |= {"nproc_per_node": 1}
    return validate(tree)
