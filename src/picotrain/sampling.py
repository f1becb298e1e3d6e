"""Text from a model: tokens one by one with a key/value cache, greedy or drawn at a temperature among the top k.

Generation never touches the random state of training: each call has its own generator, seeded by its caller.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from picotrain.config.schema import SamplingConfig
from picotrain.model import Decoder, KVCache, LanguageModel
from picotrain.tokenizer import Tokenizer

# A small model's matrices take microseconds. Threads that meet after each of them mostly wait for each other, and beside other
# processes they wait for milliseconds. On two cores one thread reads a token of d6 (12 M) at 0.8 times the speed of two threads. Beside
# two busy processes it has 1.7 times their speed (benchmarks/busy.py).
ONE_THREAD_PARAMETERS = 16 << 20


@dataclass(frozen=True)
class Sample:
    """A prompt and what the model wrote after it."""

    prompt: str
    text: str


def complete(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: SamplingConfig,
    seed: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Sample]:
    """One continuation of each prompt; prompt i is drawn with seed + i, so that it does not depend on the others.

    should_stop: asked before each token. Once it is true, nothing more is written.
    """
    return [
        Sample(prompt, "".join(stream_text(model, tokenizer, prompt, sampling, seed + i, should_stop))) for i, prompt in enumerate(prompts)
    ]


def stream_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: SamplingConfig,
    seed: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[str]:
    """Yield the continuation of a prompt piece by piece, as text; an empty prompt starts a document from nothing.

    The model reads `<|bos|>` and the prompt, and ends when it writes `<|bos|>`, the start of another document. A token
    may hold part of a character: a piece comes out when its characters are whole. Bytes that never become a character
    show as U+FFFD. It also ends before a token where `should_stop()`.
    """
    prompt_ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    options = (sampling.max_tokens, sampling.temperature, sampling.top_k)
    ids = generate(model, prompt_ids, *options, seed=seed, stop_id=tokenizer.bos_id)
    while not should_stop() and (id := next(ids, None)) is not None:
        if piece := utf8.decode(tokenizer.decode_bytes([id])):
            yield piece
    if rest := utf8.decode(b"", final=True):
        yield rest


def generate(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    stop_id: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_tokens` ids that follow a prompt of at least one id; end before `stop_id`. See `generate_rows`."""
    ids = torch.tensor([list(prompt_ids)], device=model.device)
    for row in generate_rows(model, ids, max_tokens, temperature, top_k, seed):
        id = int(row)
        if id == stop_id:
            return
        yield id


@torch.no_grad()
def generate_rows(
    model: LanguageModel, prompt_ids: Tensor, max_tokens: int, temperature: float, top_k: int | None, seed: int
) -> Iterator[Tensor]:
    """Yield `max_tokens` times the next id of each row, int64 (B,).

    prompt_ids: int64 (B, T), T >= 1. temperature 0 takes the likeliest id; top_k None draws among all.
    A context that would outgrow the model's seq_len is read anew from its first id (`<|bos|>`, which leads every row of
    training) and its last seq_len // 2 ids. That costs one such forward pass per seq_len // 2 tokens. A model without a cache reads all
    ids anew for each.
    """
    model = model.cast()
    rows, prompt_tokens = prompt_ids.shape
    total_tokens = prompt_tokens + max_tokens
    generator = torch.Generator(prompt_ids.device).manual_seed(seed)
    cache = KVCache(model, rows, min(model.seq_len, total_tokens)) if isinstance(model, Decoder) else None
    history = prompt_ids.new_empty(rows, total_tokens)
    history[:, :prompt_tokens] = prompt_ids
    unread = prompt_ids
    threads = torch.get_num_threads()
    threads_of_a_token = 1 if model.num_parameters() <= ONE_THREAD_PARAMETERS else threads
    for end in range(prompt_tokens, total_tokens):
        if (cache.length if cache else 0) + unread.size(1) > model.seq_len:
            if cache:
                cache.clear()
            unread = torch.cat((history[:, :1], history[:, end - model.seq_len // 2 : end]), dim=1)
        with _on_threads(threads_of_a_token if unread.numel() == 1 else threads):
            logits = model(unread, cache=cache, last_only=True)[:, 0] if cache else model(unread)[:, -1]  # (B, vocab_size)
        history[:, end] = next_ids(logits, temperature, top_k, generator)
        unread = history[:, end : end + 1] if cache else torch.cat((unread, history[:, end : end + 1]), dim=1)
        yield history[:, end]


@contextmanager
def _on_threads(count: int) -> Generator[None]:
    """Compute on so many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def next_ids(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """Choose an id for each row of logits (B, vocab_size) -> int64 (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    top, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)), dim=-1)  # (B, k)
    choice = torch.multinomial((top / temperature).softmax(dim=-1), 1, generator=generator)
    return ids.gather(1, choice)[:, 0]
