"""All that one training holds, built from its run directory and restored from its newest checkpoint."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from picotrain import checkpoint, optim
from picotrain import run as runs
from picotrain.config import Config
from picotrain.data.mixture import Mixture
from picotrain.data.stream import Loader
from picotrain.errors import CheckpointError, LaunchError, RunError
from picotrain.loop import archiving
from picotrain.model import LanguageModel, Names
from picotrain.model import build as build_model
from picotrain.monitor import Monitor, events, profiler
from picotrain.parallel import Parallel, Watchdog, peak_memory
from picotrain.planning import Plan
from picotrain.signals import StopSignal
from picotrain.state import TrainState
from picotrain.tokenizer import Tokenizer

if TYPE_CHECKING:
    from picotrain.checkpoint.archive import Archive


@dataclass(frozen=True)
class Training:
    """What the loop works with. `state` holds what training changes: weights, moments, the step."""

    dir: Path
    parallel: Parallel
    stop: StopSignal
    config: Config
    plan: Plan
    corpus: Mixture
    tokenizer: Tokenizer
    model: LanguageModel
    wrapped: nn.Module  # the model to train through: its gradients are means over the ranks
    state: TrainState
    guard: optim.Guard
    loader: Loader
    monitor: Monitor
    profiler: profiler.Profiler
    watchdog: Watchdog
    saver: checkpoint.Saver | None  # rank 0's, like the archive
    archive: Archive | None
    resumed_step: int | None  # of the checkpoint that training goes on from

    def event(self, name: str, message: str = "", shown: bool = True) -> None:
        """Record that something happened at this step."""
        self.monitor.event(self.state.step, name, message, shown)


def build(
    held: ExitStack, run_dir: Path, parallel: Parallel, stop: StopSignal, material: runs.Material | None, own: LanguageModel | None
) -> Training:
    """Build all that the training of `run_dir` holds. `held` closes what needs it, also where building fails, in this order: loader,
    profiler (which waits for the device while the watchdog still watches), watchdog, saver, monitor, and the archive last.

    material: what stands in the run's files; None: it is read. own: a caller's model, trained instead of the one that the config names; a
    new run begins with the weights that it has.
    """
    config, plan, corpus, tokenizer = material or runs.read_material(run_dir)
    # Compiled code is kept there, not in the system's temporary folder; torch looks when its compiler is imported.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(runs.cache_dir(config) / "compiled"))
    state: TrainState | None = None
    archive = archiving.start(config, run_dir) if parallel.is_main else None
    if archive:
        held.callback(lambda: archiving.close(archive, run_dir, config, state.step if state else 0))

    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
    model = _model(own, config, plan).to(parallel.device)
    plan, chosen = _choose_kernels(model, run_dir, config, plan, parallel)
    state = TrainState(model, optim.build(config.optimizer, model, plan.rates, parallel))
    guard = optim.Guard(config.train.skip_loss_z, parallel.device, config.optimizer.skips(parallel.device))
    monitor = Monitor(
        run_dir, config, plan, is_main=parallel.is_main, rank=parallel.rank, timer=events.build(parallel.device),
        peak_memory=lambda: peak_memory(parallel.device),
    )  # fmt: skip
    held.callback(monitor.close)
    saver = checkpoint.Saver(run_dir / "checkpoints", config.checkpoint) if parallel.is_main else None
    if saver:
        held.callback(saver.wait)
        monitor.saving = lambda: saver.busy
    watchdog = held.enter_context(Watchdog(config.launch.hang_s, run_dir / "flight_recorder" / f"rank_{parallel.rank}.json"))
    resumed_step = _restore(run_dir, config, plan, corpus, state, guard, monitor, fresh=None if own else model)
    if chosen:
        monitor.event(state.step, "attention", chosen)
    looks = profiler.build(monitor, parallel.device, state.step)
    held.callback(looks.close)

    if plan.compile:
        model.compile_blocks()
    wrapped = parallel.wrap(model)
    place: dict[str, Any] = {"dp_rank": parallel.dp_rank, "dp_size": parallel.dp_size, "device": parallel.device}
    loader = held.enter_context(
        Loader(corpus, tokenizer, **plan.stream, **place, seed=config.run.seed, state=state.loader, on_bad_shard=config.data.on_bad_shard)
    )
    state.loader = state.loader or loader.state  # a first step that is given up half-way saves the start
    return Training(
        run_dir, parallel, stop, config, plan, corpus, tokenizer, model, wrapped, state, guard, loader, monitor, looks, watchdog, saver,
        archive, resumed_step,
    )  # fmt: skip


def _model(own: LanguageModel | None, config: Config, plan: Plan) -> LanguageModel:
    """The model to train, on the CPU. Raises RunError for a caller's that does not fit the plan."""
    for name, planned in (("vocab_size", plan.vocab_size), ("seq_len", plan.seq_len)):
        if own is not None and getattr(own, name) != planned:
            raise RunError(f"the model's {name} is {getattr(own, name):,}, and the run's {planned:,}; they have to be the same")
    return build_model(config.model, plan.vocab_size, plan.seq_len, plan.precision, plan.recompute, own)


def _choose_kernels(model: LanguageModel, run_dir: Path, config: Config, plan: Plan, parallel: Parallel) -> tuple[Plan, str]:
    """Choose the attention's kernels, the same on every rank: the plan with them. A new choice goes into plan.json, for a resume, and is
    told in words; "" is none."""
    hw, kept = config.hardware, Names(plan.attention, plan.window_attention or "auto")
    choice = model.choose_kernels(Names(hw.attention, hw.window_attention), kept)
    if choice is None:
        return plan, ""
    full, windowed = choice
    names = parallel.gather([full.kernel.name, windowed.kernel.name])
    if any(others != names[0] for others in names):
        text = "; ".join(f"rank {rank}: {', '.join(own)}" for rank, own in enumerate(names))
        raise LaunchError(f"attention works differently on the ranks ({text}); set hardware.attention and hardware.window_attention")
    in_windows = plan.window_attention and windowed.kernel.name
    found = plan.model_copy(update={"attention": full.kernel.name, "window_attention": in_windows})
    if found == plan:
        return plan, ""
    if parallel.is_main:
        found.save(run_dir / "plan.json")
    return found, f"by {full}" + (f"; in windows by {windowed}" if in_windows else "")


def _restore(
    run_dir: Path,
    config: Config,
    plan: Plan,
    corpus: Mixture,
    state: TrainState,
    guard: optim.Guard,
    monitor: Monitor,
    fresh: LanguageModel | None,
) -> int | None:
    """Go on from the newest whole checkpoint, if there is one; the step it was saved at. fresh: the model, where a new
    run draws its weights."""
    damaged: list[str] = []
    path = checkpoint.newest(run_dir / "checkpoints", damaged.append)
    if path is None and damaged:
        raise CheckpointError(_all_damaged(run_dir, damaged))
    for text in damaged:
        monitor.warn(f"WARNING: {text}; falling back to the checkpoint before it")
    if path is None:
        torch.manual_seed(config.run.seed)  # nothing draws from it yet; what will, goes on from its checkpoints
        if fresh:
            fresh.init_weights(config.run.seed)
        monitor.start(0)
        return None
    metrics_bytes = checkpoint.load(path, state)
    repeat = [source.repeat for source in corpus.sources]
    checkpoint.require_fits(path, state, plan.lanes or 0, repeat, plan.rows_per_step)
    loop = state.loop
    guard.load_state_dict(loop.recent_losses)
    monitor.start(state.step, metrics_bytes, loop.smoother, loop.total_training_time, loop.skipped)
    return state.step


def _all_damaged(run_dir: Path, damaged: list[str]) -> str:
    """What to tell a user whose run has checkpoints, of which none can be used."""
    reasons = "\n".join(f"  - {text}" for text in damaged)
    return (
        f"{run_dir} has checkpoints, and all of them are damaged:\n{reasons}\n"
        "none was touched. Put one back from an archive or a copy; or begin anew with another run.dir (run.resume=never refuses whatever "
        "is a run already); or move the folder checkpoints away to begin anew here"
    )
