"""Tokens per second of sampling with the key/value cache, against reading the whole context for every token.

Prints one JSON line. Prompt of 32 tokens, 256 new ones, greedy, random weights; medians of interleaved repeats.

    python benchmarks/sampling.py [--depth 4] [--precision fp32] [--threads 2] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from common import script

import torch
from torch import Tensor

from picotrain.model import DTYPES
from picotrain.models.gpt import GPTConfig
from picotrain.models.gpt.module import GPT
from picotrain.sampling import generate_rows

VOCAB_SIZE, SEQ_LEN = 8192, 512
PROMPT_TOKENS, NEW_TOKENS = 32, 256


def with_cache(model: GPT, prompt: Tensor) -> None:
    """Greedy continuation as `picotrain sample` makes it."""
    for _ in generate_rows(model, prompt, NEW_TOKENS, temperature=0, top_k=None, seed=0):
        pass


@torch.no_grad()
def without_cache(model: GPT, prompt: Tensor) -> None:
    """The same, every token from the whole sequence."""
    ids = prompt
    for _ in range(NEW_TOKENS):
        ids = torch.cat((ids, model(ids, last_only=True)[:, 0].argmax(dim=-1, keepdim=True)), dim=1)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(options.threads)

    model = GPT(GPTConfig(depth=options.depth, head_dim=64), VOCAB_SIZE, SEQ_LEN, DTYPES[options.precision]).to(options.device)
    model.init_weights(seed=0)
    generator = torch.Generator().manual_seed(0)
    cases: dict[str, tuple[Callable[[GPT, Tensor], None], Tensor]] = {}
    for batch in (1, 8):
        prompt = torch.randint(VOCAB_SIZE, (batch, PROMPT_TOKENS), generator=generator).to(options.device)
        cases[f"batch_{batch}"] = (with_cache, prompt)
        if batch == 1:
            cases["batch_1_without_cache"] = (without_cache, prompt)

    rates: dict[str, list[float]] = {name: [] for name in cases}
    with_cache(model, prompt)  # warm-up
    for _ in range(options.repeats):
        for name, (generate, prompt) in cases.items():
            start = time.perf_counter()
            generate(model, prompt)
            if options.device == "cuda":
                torch.cuda.synchronize()
            rates[name].append(len(prompt) * NEW_TOKENS / (time.perf_counter() - start))
    yield {
        "benchmark": "sampling",
        "unit": "tokens/s",
        **{name: round(statistics.median(values), 1) for name, values in rates.items()},
        **vars(options),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    raise SystemExit(script(__file__))
