"""How long a run will take, said before anything long begins; and what to type where that is too long.

What only a measurement can tell is measured once and kept: the matmul ceiling, in a process of its own, since torch takes what it is
given in its first seconds (threads, allocator) for good.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from picotrain import hardware, planning
from picotrain import run as runs
from picotrain.bench.processes import BenchmarkFailed, lines
from picotrain.cli import say
from picotrain.config import Config, compose
from picotrain.config.schema import HORIZONS
from picotrain.errors import PicotrainError
from picotrain.planning import Plan, ceilings, pace
from picotrain.text import duration

SHORT_FLOPS = 2e12  # of training: a minute or so on the slowest machine, and not worth a measurement that takes seconds
LONG_S = 20 * 60  # a run without a GPU that takes longer is told with what would take minutes
MINUTES_S = 5 * 60  # what "minutes" is
FEWEST_STEPS = 100  # fewer show nothing of a loss curve
BATCHES = (None, 65_536, 16_384, 4096)  # tokens per step, tried in this order; None: as it is
EVAL_TOKENS = 131_072  # of a run of minutes, as experiment=cpu_speedrun has it
SPEEDRUN = "experiment=cpu_speedrun"


class Command(NamedTuple):
    """A `picotrain train` as it was typed."""

    overrides: Sequence[str]
    config_file: Path | None = None
    config_dir: Path | None = None

    def config(self, overrides: Sequence[str], cache: str | None) -> Config:
        """Decided, as far as a plan needs it. Raises ConfigError."""
        config = runs.resolve(compose(overrides, config_dir=self.config_dir, config_file=self.config_file), lambda text: None)
        return config.model_copy(update={"run": config.run.model_copy(update={"cache_dir": cache})})

    def words(self, overrides: Sequence[str]) -> str:
        """For a shell."""
        options = [("--config", self.config_file), ("--config-dir", self.config_dir)]
        given = [word for name, value in options if value for word in (name, str(value))]
        return shlex.join(["picotrain", "train", *given, *overrides])


def calibrate(config: Config) -> None:
    """Measure and keep this machine's matmul ceiling where a time can be told in no other way. Raises ConfigError for a bad config."""
    plan, known = planning.make(config, "estimate"), ceilings.find(config)
    busy = hardware.others_compute()
    wanted = plan.predicted_by is None if known is None else plan.predicted_by == "assumed" and known.busy and not busy
    if not wanted or not config.run.cache_dir or not ceilings.is_here(config):
        return
    options = ["--device", config.hardware.device, "--precision", ceilings.precision(config), "--repeats", "7"]
    options += ["--threads", str(config.hardware.threads)] if config.hardware.device == "cpu" else []
    try:
        (line,) = lines("matmul", options)
        found = ceilings.Ceiling(setting=ceilings.setting(config), gflops=line["best_gflops"], busy=busy)
        pace.remember(json.dumps(found.model_dump()), Path(config.run.cache_dir), ceilings.FILE)
    except BenchmarkFailed as error:
        say(f"warning: how fast this machine multiplies could not be measured: {str(error).strip().splitlines()[-1]}")
    except OSError as error:
        say(f"warning: {config.run.cache_dir} cannot keep how fast this machine is ({error.strerror}); set PICOTRAIN_CACHE to one that can")


def announce(config: Config, command: Command | None) -> bool:
    """Say how long a run that is about to start or to go on will take; False: it hangs on the corpus, which is not there yet.

    command: of a new run, for what would take minutes. A run that is short is not worth a word, one that is finished has none left;
    what is wrong with the config is said by whoever opens it.
    """
    run_dir = Path(config.run.dir or "")
    going_on = (run_dir / "config.yaml").exists()
    try:
        known = runs.read_plan(run_dir) if going_on else None
        plan = _same_horizon(runs.preview(config), known)
        done = _steps_done(run_dir) if going_on else 0
        unknown = _horizon_unknown(plan)
        if runs.is_finished(run_dir, plan.num_steps) or (not unknown and plan.total_tokens * plan.flops_per_token < SHORT_FLOPS):
            return True
        runs.check_machine(config)
        calibrate(config)
        plan = _same_horizon(runs.preview(config), known)
    except PicotrainError:
        return True
    if unknown:
        return False
    say_time(plan, config, command, done)
    return True


def _horizon_unknown(plan: Plan) -> bool:
    return plan.horizon == "train.num_train_epochs" and plan.epochs is None


def _same_horizon(plan: Plan, known: Plan | None) -> Plan:
    """The plan of a run that goes on, whose corpus has told the number of steps before."""
    if known is None or not _horizon_unknown(plan) or known.horizon != plan.horizon:
        return plan
    return plan.model_copy(update={key: getattr(known, key) for key in ("num_steps", "total_tokens", "epochs")})


def say_time(plan: Plan, config: Config, command: Command | None, done: int = 0) -> None:
    """One line: the time, from what it is known, and what would take minutes."""
    seconds = pace.seconds_left(plan, config, done)
    if seconds is None:
        return say(f"how long this run takes is not known: {plan.predicted_from}")
    what = f"from step {done:,} on this run takes" if done else "this run takes"
    text = f"{what} about {duration(seconds)} on this machine ({told_by(plan)})"
    small = hardware.detect().device == "cpu" and seconds > LONG_S and not done
    say(text + (f"; for a result in minutes: {', or '.join(found)}" if small and command and (found := shorter(command, config)) else ""))


def told_by(plan: Plan) -> str:
    """From what a time is known."""
    return f"assuming {plan.predicted_from}" if plan.predicted_by == "assumed" else f"from {plan.predicted_from}"


def shorter(command: Command, config: Config) -> list[str]:
    """Commands for a result in minutes, each with what it takes: the preset for that, and this very command with fewer steps."""
    found = []
    if SPEEDRUN not in command.overrides:
        with suppress(PicotrainError):
            speedrun = Command([SPEEDRUN])
            small = speedrun.config(speedrun.overrides, config.run.cache_dir)
            seconds = pace.seconds_left(planning.make(small, "estimate"), small)
            found.append(f"`{speedrun.words(speedrun.overrides)}`" + (f" (about {duration(seconds)})" if seconds else ""))
    for batch in BATCHES:
        with suppress(PicotrainError):
            if text := _fewer_steps(command, config, batch):
                return [*found, text]
    return found


def _fewer_steps(command: Command, config: Config, batch: int | None) -> str:
    """The command with as many steps as take minutes, "" where those are too few to show anything."""
    changes = {"train.max_steps": 1000} | ({"train.total_batch_size": batch} if batch else {})
    if config.train.eval_every > 0 and config.train.eval_tokens > EVAL_TOKENS:
        changes["train.eval_tokens"] = EVAL_TOKENS
    dropped = {*changes, *(f"train.{key}" for key in HORIZONS)}
    kept = [_other_place(word) for word in command.overrides if word.partition("=")[0].lstrip("+") not in dropped]
    for _ in range(2):  # whether it is compiled hangs on the horizon, too
        words = [*kept, *(f"{key}={value}" for key, value in changes.items())]
        shorter_config = command.config(words, config.run.cache_dir)
        plan = planning.make(shorter_config, "estimate")
        if not plan.predicted_step_ms:
            return ""
        evals_s = 3 * (plan.predicted_eval_s or 0)
        steps = (MINUTES_S - evals_s) * 1000 / plan.predicted_step_ms
        if steps < FEWEST_STEPS:
            return ""
        scale = 10 ** int(math.log10(steps) - 1)
        changes["train.max_steps"] = int(steps / scale) * scale
    words = [*kept, *(f"{key}={value}" for key, value in changes.items())]
    shorter_config = command.config(words, config.run.cache_dir)
    seconds = pace.seconds_left(planning.make(shorter_config, "estimate"), shorter_config)
    return f"`{command.words(words)}`" + (f" (about {duration(seconds)})" if seconds else "")


def _other_place(word: str) -> str:
    """A run that was named by hand gets another name: the one that starts now has it."""
    return f"{word.rstrip('/')}-short" if word.startswith(("run.name=", "run.dir=")) else word


def _steps_done(run_dir: Path) -> int:
    """By the newest checkpoint that the pointer names; 0 where there is none."""
    try:
        return int((run_dir / "checkpoints" / "latest").read_text().strip().rpartition("_")[2])
    except (OSError, ValueError):
        return 0
