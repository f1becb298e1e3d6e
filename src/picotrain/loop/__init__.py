"""The training loop: batch, forward, backward, step. What is due at a step is a flat list of lines, in a fixed order.

At step s (s updates are done) every rank does, in this order: wait for the step's rows, agree on a stop, save, stop if asked to, evaluate
(bits per byte, CORE, samples), end, train on the micro-batches of one step, log. A save comes before anything that could cost the weights,
and an evaluation that fails costs neither.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack
from pathlib import Path

from picotrain import optim
from picotrain.loop.ending import Outcome, end, why_stopping
from picotrain.loop.evaluations import evaluations
from picotrain.loop.saves import Saves
from picotrain.loop.step import Step, warm_up
from picotrain.loop.training import build
from picotrain.model import LanguageModel
from picotrain.parallel import Parallel
from picotrain.run import Material
from picotrain.signals import StopSignal

__all__ = ["Outcome", "train"]


def train(
    run_dir: Path, parallel: Parallel, stop: StopSignal, material: Material | None = None, model: LanguageModel | None = None
) -> Outcome:
    """Train the run in `run_dir` from its newest checkpoint to its last step, or until every rank agrees to stop.

    material: what stands in the run's files; None: it is read. model: a caller's own, instead of the one that the config names; a new run
    begins with the weights that it has.
    """
    with ExitStack() as held:
        with stop.ending("starting"):
            run = build(held, run_dir, parallel, stop, material, model)
        plan, state, save_every = run.plan, run.state, run.config.train.save_every
        saves = Saves(run)
        measured = evaluations(run, saves)
        warm_up(run)
        gc.enable()  # off since the worker began

        while True:
            run.watchdog.beat()
            last = state.step >= plan.num_steps
            # No rank may save, stop or train alone: the others would wait for it for ever. So the rows are waited for before anything
            # is done with them, and what one rank met or was asked for (a shard that cannot be read, a signal) all ranks learn here.
            step = Step(run)
            unreadable = None if last else step.wait_for_rows()
            stopping, rolling = parallel.on_any_rank(stop.requested or unreadable is not None, saves.rolling_due())

            stopped = why_stopping(run, unreadable) if stopping else None
            permanent = last or stopping or (save_every > 0 and state.step > 0 and state.step % save_every == 0)
            if permanent or rolling:
                saves.save(permanent)
            if stopped:
                return end(run, saves, stopped)
            if not all(evaluation.measure() for evaluation in measured if evaluation.due(state.step, last)):
                continue  # a stop interrupts an evaluation, which is given up: the next turn sees the stop and ends
            if last:
                return end(run, saves)

            step.begin()
            for micro in range(plan.grad_accum_steps):
                given_up = micro > 0 and parallel.agree(stop.requested)
                if given_up:
                    break
                batch = next(run.loader)
                with parallel.sync_gradients(run.wrapped, on=micro == plan.grad_accum_steps - 1):
                    loss = run.wrapped(batch.inputs, batch.targets) / plan.grad_accum_steps
                    loss.backward()
                step.add(batch, loss)
            if given_up:  # what has accumulated is dropped; the next turn saves and ends
                continue

            loss = parallel.mean(step.loss)
            grad_norm = parallel.clip(run.model.parameters(), run.config.train.grad_clip)
            skipped = run.guard.skip(state.optimizer, loss, grad_norm)  # decided on the device: no sync
            lr_factor = run.config.schedule.factor(state.step, plan.num_steps)
            optim.set_lr(state.optimizer, lr_factor)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.loader = batch.state  # the last row trained on, never one that was prefetched
            step.log(lr_factor, loss=loss, grad_norm=grad_norm, skipped=skipped)
