"""The training step beside that of peers' architectures, interleaved. One JSON line per depth.

    python benchmarks/peers.py [--depth 4 6] [--precision bf16] [--repeats 3]

A peer is an implementation in `transformers` of the same depth, width, heads, vocabulary and batch, trained as its users do in its best
mode: autocast, torch.compile of the whole model, fused AdamW, under the same allocator setting and threads as picotrain; nobody clips.
It stands in for projects that cannot be installed as packages:

    gpt2        GPT2LMHeadModel: nanoGPT's architecture (learned positions, LayerNorm, GELU, tied head)
    nanochat    NanoChatForCausalLM: nanochat's without value embeddings, smear, windows and Muon

tok_per_sec: medians over the repeats, of the median step. times: picotrain's rate over the peer's, median of the ratios within a repeat.
first_step_s: with empty compile caches in the first repeat, first_step_warm_s: median of the others.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

from common import script

from picotrain import hardware
from picotrain.bench import processes
from picotrain.config.schema import HardwareConfig
from picotrain.errors import PicotrainError
from picotrain.models.gpt import GPTConfig

PEERS = ("gpt2", "nanochat")
OURS = "picotrain"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depth", type=int, nargs="+", default=[4, 6])
    parser.add_argument("--peers", choices=PEERS, nargs="+", default=list(PEERS))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if hardware.cpu().fast_bf16 else "fp32")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", choices=PEERS, help="measure this peer alone, in this process")


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if options.one:
        yield measure(options.one, options)
        return
    who = (OURS, *options.peers)
    for depth in options.depth:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in who}
        with tempfile.TemporaryDirectory() as cache:
            for _ in range(options.repeats):
                for name in who:
                    found[name] += _in_a_process(name, depth, cache, options)
        rates = {name: [line["tok_per_sec"] for line in lines] for name, lines in found.items()}
        ratios = {peer: [a / b for a, b in zip(rates[OURS], rates[peer], strict=True)] for peer in options.peers}
        ours = found[OURS][0]
        yield {
            "benchmark": "peers",
            **{key: ours[key] for key in ("depth", "seq_len", "batch", "vocab", "precision", "hardware", "threads", "torch")},
            "tok_per_sec": {name: round(statistics.median(values)) for name, values in rates.items()},
            "times": {peer: round(statistics.median(values), 2) for peer, values in ratios.items()},
            "times_least": {peer: round(min(values), 2) for peer, values in ratios.items()},
            "first_step_s": {name: lines[0]["first_step_s"] for name, lines in found.items()},
            "first_step_warm_s": {name: _warm(lines) for name, lines in found.items()},
            "peak_rss_mib": {name: lines[-1]["peak_rss_mib"] for name, lines in found.items()},
            "matmul_gflops": round(statistics.median(line["matmul_gflops"] for line in found[OURS]), 1),
            "repeats": options.repeats,
        }


def _warm(lines: list[dict[str, Any]]) -> float | None:
    return round(statistics.median(line["first_step_s"] for line in lines[1:]), 2) if lines[1:] else None


def _in_a_process(name: str, depth: int, cache: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    words = [f"--{key}={getattr(options, key.replace('-', '_'))}" for key in ("precision", "seq-len", "batch", "vocab", "steps", "warmup")]
    words += [f"--depth={depth}"]
    variables = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/{name}"}
    if name == OURS:
        return processes.lines("step", [*words, "--compile"], variables)
    return processes.lines(__file__, [*words, f"--one={name}"], variables)


def measure(peer: str, options: argparse.Namespace) -> dict[str, Any]:
    """One peer at one depth, in this process."""
    import torch

    from picotrain.bench.timing import Clock, peak_rss_bytes
    from picotrain.worker import set_up_process

    set_up_process(HardwareConfig(device="cpu"))
    (depth,) = options.depth
    model = _build(peer, depth, options).train()
    step_of = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    ids = torch.randint(options.vocab, (options.batch, options.seq_len))
    clock = Clock("cpu")
    marks = [clock.mark()]
    for _ in range(options.warmup + options.steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            loss = step_of(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(clock.mark())
    seconds = [clock.seconds(start, end) for start, end in itertools.pairwise(marks)]
    return {
        "benchmark": "peer",
        "peer": peer,
        "tok_per_sec": round(ids.numel() / statistics.median(seconds[options.warmup :])),
        "first_step_s": round(seconds[0], 2),
        "peak_rss_mib": round(peak_rss_bytes() / 2**20),
    }


def _build(peer: str, depth: int, options: argparse.Namespace) -> Any:
    """The peer's model in picotrain's shape. Raises PicotrainError where transformers is missing."""

    try:
        import transformers
    except ImportError as error:
        raise PicotrainError(f"the peers are models of transformers: {error}; pip install 'picotrain[hf]'") from error
    dims = GPTConfig(depth=depth, head_dim=64).dims()
    if peer == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=options.vocab, n_positions=options.seq_len, n_embd=dims.width, n_layer=depth, n_head=dims.n_heads,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    config = transformers.NanoChatConfig(
        vocab_size=options.vocab, hidden_size=dims.width, intermediate_size=dims.mlp_width, num_hidden_layers=depth,
        num_attention_heads=dims.n_heads, num_key_value_heads=dims.n_heads, max_position_embeddings=options.seq_len,
    )  # fmt: skip
    return transformers.NanoChatForCausalLM(config)


if __name__ == "__main__":
    raise SystemExit(script(__file__))
