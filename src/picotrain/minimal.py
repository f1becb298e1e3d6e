"""The training loop in about twenty lines, to learn from: `python -m picotrain.minimal model=d2 train.max_steps=20`.

Same model, data, optimizer and schedule as `picotrain train` on a CPU; no evaluation, checkpoint or second process.
A test holds its losses equal to the loop's. As a command it takes small steps, unless it is told a train.total_batch_size.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from picotrain import optim, ranks
from picotrain.config import Config, compose, with_values
from picotrain.data.stream import Loader
from picotrain.errors import PicotrainError
from picotrain.model import build
from picotrain.run import gather, resolve
from picotrain.terminal import say, set_up

STEP_TOKENS = 8192  # a second or so of a small model


def losses(config: Config) -> Iterator[float]:
    """Train, yielding the loss of every step."""
    config, p, corpus, tokenizer = gather(resolve(config, say), say)
    model = build(config.model, p.vocab_size, p.seq_len, p.precision)
    model.init_weights(config.run.seed)
    optimizer = optim.build(config.optimizer, model, p.rates)
    with Loader(corpus, tokenizer, **p.stream, seed=config.run.seed) as batches:
        for step in range(p.num_steps):
            total = 0.0
            for _ in range(p.grad_accum_steps):  # a step's rows in pieces that fit the memory
                batch = next(batches)  # ids (B, T), and the ids that follow them (B, T)
                loss = model(batch.inputs, batch.targets) / p.grad_accum_steps  # forward: how surprised is the model by the next token?
                loss.backward()  # backward: how would each weight change that?
                total += loss.item()
            optim.set_lr(optimizer, config.schedule.factor(step, p.num_steps))
            optimizer.step()  # step: change every weight a little
            optimizer.zero_grad()
            yield total


if __name__ == "__main__":
    set_up()
    try:
        ranks.settle()  # says what a cluster's job script has left in the environment
        chosen = compose(["hardware=cpu", *sys.argv[1:]])
        if chosen.train.total_batch_size == -1:
            chosen = with_values(chosen, {"train.total_batch_size": STEP_TOKENS})
        for number, value in enumerate(losses(chosen)):
            print(f"step {number:5d}  loss {value:.4f}", flush=True)
    except PicotrainError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
