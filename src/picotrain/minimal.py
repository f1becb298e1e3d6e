"""The training loop in about twenty lines, to learn from: `python -m picotrain.minimal model=d2 train.max_steps=20`.

Same model, data, optimizer and schedule as `picotrain train`; no accumulation, evaluation, checkpoint or second process.
A test holds its losses equal to the loop's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from picotrain import optim, ranks, schedule
from picotrain.config import Config, compose
from picotrain.data.stream import Loader
from picotrain.model import GPT
from picotrain.run import gather, locate


def losses(config: Config) -> Iterator[float]:
    """Train, yielding the loss of every step."""
    config, p, corpus, tokenizer = gather(locate(config), print)
    model = GPT(config.model, p.vocab_size, p.seq_len)
    model.init_weights(config.run.seed)
    optimizer = optim.build(config.optimizer, model, p.rates)
    factor = schedule.build(config.schedule, p.num_steps)
    with Loader(corpus, tokenizer, **p.stream, seed=config.run.seed) as batches:
        for step in range(p.num_steps):
            batch = next(batches)  # ids (B, T), and the ids that follow them (B, T)
            loss = model(batch.inputs, batch.targets)  # forward: how surprised is the model by the next token?
            loss.backward()  # backward: how would each weight change that?
            optim.set_lr(optimizer, factor(step))
            optimizer.step()  # step: change every weight a little
            optimizer.zero_grad()
            yield loss.item()


if __name__ == "__main__":
    ranks.settle()  # says what a cluster's job script has left in the environment
    for number, value in enumerate(losses(compose(sys.argv[1:]))):
        print(f"step {number:5d}  loss {value:.4f}")
