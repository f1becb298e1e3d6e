"""nanoGPT's own CPU recipe on tinyshakespeare beside picotrain, both measured on the same text: its last tenth. One JSON line per trainer.

    python benchmarks/tinyshakespeare.py tinyshakespeare.txt --nanogpt ../nanoGPT [--steps 300] [--repeats 3]

nanoGPT is not part of this project: --nanogpt names a checkout of it, which is copied and run as its README says for a CPU (4 layers,
128 wide, block 64, batch 12, 2,000 iterations, characters); its script wants `pip install requests`. Without --nanogpt only picotrain
runs. picotrain trains `experiment=cpu_speedrun` on the first nine tenths, for --steps steps.

bits_per_char    over the whole last tenth, 111,540 characters (a character is a byte here), by each trainer's last weights, every
                 character predicted once, in rows of the length that it was trained with
command_s        the whole command that trains: imports, the tokenizer, training, evaluations, saves, the report
Runs are interleaved; figures are medians of --repeats, and command_s_all has every run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DOCUMENT_CHARS = 4000  # of the training text, about; speeches stay whole

# As nanoGPT's README has it for a CPU.
NANOGPT = [
    "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64",
    "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0",
]  # fmt: skip

# Runs in nanoGPT's folder: its last checkpoint over the whole last tenth, in blocks as long as it was trained with.
NANOGPT_BITS = """
import numpy, torch
from model import GPT, GPTConfig
saved = torch.load("out-shakespeare-char/ckpt.pt", map_location="cpu", weights_only=False)  # it wrote this file itself
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval()
block = model.config.block_size
ids = torch.from_numpy(numpy.fromfile("data/shakespeare_char/val.bin", dtype=numpy.uint16).astype(numpy.int64))
total = count = 0
with torch.no_grad():
    for start in range(0, len(ids) - 1, block):
        row = ids[start : start + block + 1]
        loss = model(row[None, :-1], row[None, 1:])[1]
        total, count = total + float(loss) * (len(row) - 1), count + len(row) - 1
print(total / count)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="tinyshakespeare.txt (char-rnn's input.txt)")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--steps", type=int, default=300, help="of picotrain")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further overrides for picotrain")
    options = parser.parse_args()
    trainers: dict[str, Callable[[Path], tuple[float, float]]] = {}
    if options.nanogpt:
        trainers["nanoGPT"] = lambda folder: nanogpt(options.nanogpt, options.text, folder)
    trainers["picotrain"] = lambda folder: picotrain(options.text, options.steps, options.set, folder)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in trainers}
    for _ in range(options.repeats):
        for name, train in trainers.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(train(Path(folder)))
    for name, runs in found.items():
        print(json.dumps(_line(name, runs, options)), flush=True)


def _line(name: str, runs: list[tuple[float, float]], options: argparse.Namespace) -> dict[str, Any]:
    bits, seconds = ([run[part] for run in runs] for part in (0, 1))
    return {
        "benchmark": "tinyshakespeare",
        "trainer": name,
        "recipe": " ".join(NANOGPT)
        if name == "nanoGPT"
        else " ".join(["experiment=cpu_speedrun", *_overrides(options.steps, options.set)]),
        "bits_per_char": round(statistics.median(bits), 4),
        "command_s": round(statistics.median(seconds), 1),
        "command_s_all": [round(value, 1) for value in seconds],
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def nanogpt(checkout: Path, text: Path, folder: Path) -> tuple[float, float]:
    """Bits per character, and the seconds of its train.py."""
    home = folder / "nanoGPT"
    shutil.copytree(checkout, home, ignore=shutil.ignore_patterns(".git", "out*", "*.bin"))
    shutil.copyfile(text, home / "data" / "shakespeare_char" / "input.txt")
    _ended([sys.executable, "data/shakespeare_char/prepare.py"], home)
    seconds, _ = _ended([sys.executable, "train.py", *NANOGPT], home)
    _, nats = _ended([sys.executable, "-c", NANOGPT_BITS], home)
    return float(nats.split()[-1]) / math.log(2), seconds


def picotrain(text: Path, steps: int, more: list[str], folder: Path) -> tuple[float, float]:
    """Bits per character, and the seconds of `picotrain train`."""
    everything = text.read_text()
    cut = int(len(everything) * 0.9)  # as nanoGPT's prepare.py has it
    corpus = folder / "tinyshakespeare"
    corpus.mkdir()
    pq.write_table(pa.table({"text": _documents(everything[:cut])}), corpus / "shard_00000.parquet")
    pq.write_table(pa.table({"text": [everything[cut:]]}), corpus / "shard_00001.parquet")
    words = ["experiment=cpu_speedrun", "data=files", f"data.path={corpus}", *_overrides(steps, more)]
    places = [f"run.dir={folder / 'run'}", f"run.cache_dir={folder / 'cache'}"]
    seconds, _ = _ended([sys.executable, "-m", "picotrain", "train", *words, *places], folder)
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [line["val_bpb"] for line in lines if line["kind"] == "val"][-1], seconds


def _overrides(steps: int, more: list[str]) -> list[str]:
    return [f"train.max_steps={steps}", *more]


def _documents(text: str) -> list[str]:
    """Whole speeches, about DOCUMENT_CHARS at a time; together they are the text."""
    documents = [""]
    for speech in text.split("\n\n"):
        if len(documents[-1]) > DOCUMENT_CHARS:
            documents.append("")
        documents[-1] += speech + "\n\n"
    documents[-1] = documents[-1].removesuffix("\n\n")
    return documents


def _ended(command: list[str], folder: Path) -> tuple[float, str]:
    """Seconds that a command took, and what it printed. Exits with its output where it failed."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return time.perf_counter() - started, done.stdout


if __name__ == "__main__":
    main()
