"""The training loop: batch, forward, backward, step. What is due at a step is a flat list of `if` lines.

At step s (s updates are done) every rank does, in this order: wait for the step's rows, agree on a stop, save, stop if
asked to, measure bits per byte and CORE, sample, end, train on the micro-batches of one step, log. A save comes before anything that
could cost the weights, and an evaluation that fails costs neither.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from picotrain import optim
from picotrain.loop.session import Outcome, Session
from picotrain.parallel import Parallel
from picotrain.signals import StopSignal

__all__ = ["Outcome", "train"]


def train(run_dir: Path, parallel: Parallel, stop: StopSignal) -> Outcome:
    """Train the run in `run_dir` from its newest checkpoint to its last step, or until every rank agrees to stop."""
    with Session(run_dir, parallel, stop) as run:
        plan, cadence, state = run.plan, run.config.train, run.state
        saved_step = run.resumed_step
        run.warm_up()
        gc.enable()  # off since the worker began

        while True:
            run.watchdog.beat()
            step = state.step
            last = step >= plan.num_steps
            failed = None if last else run.look_ahead()
            stopping, rolling = parallel.agree_each(stop.requested or failed is not None, run.rolling_due)

            if stopping:
                run.say_why(failed)
            permanent = last or stopping or _every(cadence.save_every, step, first=False)
            if step != saved_step and (permanent or rolling):
                run.save(rolling=not permanent)
                saved_step = step
            elif permanent:
                run.keep()
            if stopping:
                return run.end("stopped")
            # An evaluation that a stop interrupts is given up: the next turn sees the stop and ends.
            if _due(cadence.eval_every, step, last, first=True) and not run.evaluate():
                continue
            if _due(cadence.core_metric_every, step, last, first=False) and not run.core():
                continue
            if _due(cadence.sample_every, step, last, first=False) and not run.sample():
                continue
            if last:
                return run.end("finished")

            run.begin(step)
            loss = torch.zeros((), device=parallel.device)
            wait_ms, source_rows = 0.0, torch.zeros(len(run.corpus.sources))
            for micro in range(plan.grad_accum_steps):
                given_up = micro > 0 and parallel.agree(stop.requested)
                if given_up:
                    break
                batch = next(run.loader)
                with parallel.sync_gradients(run.wrapped, on=micro == plan.grad_accum_steps - 1):
                    micro_loss = run.wrapped(batch.inputs, batch.targets) / plan.grad_accum_steps
                    micro_loss.backward()
                loss += micro_loss.detach()
                wait_ms += batch.wait_ms
                source_rows += torch.tensor(batch.source_rows)
            if given_up:  # what has accumulated is dropped; the next turn saves and ends
                continue

            loss = parallel.mean(loss)
            grad_norm = parallel.clip(run.model.parameters(), cadence.grad_clip)
            skipped = run.guard.skip(state.optimizer, loss, grad_norm)  # decided on the device: no sync
            lr_factor = run.config.schedule.factor(step, plan.num_steps)
            optim.set_lr(state.optimizer, lr_factor)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.loader = batch.state  # the last row trained on, never one that was prefetched

            values = {"loss": loss, "grad_norm": grad_norm, "skipped": skipped, "lr_factor": lr_factor, "data_wait_ms": wait_ms}
            run.log(step, batch, source_rows, **values)


def _every(interval: int, step: int, first: bool) -> bool:
    return interval > 0 and (first or step > 0) and step % interval == 0


def _due(interval: int, step: int, last: bool, first: bool) -> bool:
    return interval > 0 and (last or _every(interval, step, first))
