"""What the tests share: a small learnable corpus, a config that trains on it in a second, and the command itself."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from picotrain import terminal

terminal.print_log()  # as commands do: what tests call in their own process is printed, too

# Two test processes share the cores, and a thread that spins at a barrier keeps the core from the one it waits for: the suite's slowest
# tests took five times as long. Read when torch is loaded, here and in the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

SUBJECTS = ["the cat", "a grey dog", "our neighbour", "the old ship", "every student", "the loop", "Ümit", "a small model"]
VERBS = ["sees", "follows", "paints", "counts", "forgets", "carries", "measures", "reads"]
OBJECTS = ["the river", "two apples", "a long letter", "the gradient", "seven tokens", "the naïve café", "its own shadow", "日本の本"]


def sentence(rng: random.Random) -> str:
    """One of 512 sentences: a model that learns which words follow which does far better than chance."""
    return f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)}."


def write_corpus(root: Path, documents: int = 600, shards: int = 3, seed: int = 0, rows_per_group: int = 20) -> Path:
    """Parquet shards of documents of 1 to 40 sentences; the last shard validates."""
    rng = random.Random(seed)
    root.mkdir(parents=True)
    for shard in range(shards):
        texts = [" ".join(sentence(rng) for _ in range(rng.randint(1, 40))) for _ in range(documents // shards)]
        pq.write_table(pa.table({"text": texts}), root / f"shard_{shard:05d}.parquet", row_group_size=rows_per_group)
    return root


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny(corpus_dir: Path, cache: Path) -> Callable[..., list[str]]:
    """Overrides of a run that takes about a second: 64 wide, 32 tokens a row, 8 rows a step, fp32, one thread."""

    def overrides(run_dir: Path, *more: str) -> list[str]:
        base = [
            "model=d2", "model.width=64", "model.head_dim=32", "data=files", f"data.path={corpus_dir}", "data.unit_bytes=8192",
            "tokenizer.vocab_size=300", "tokenizer.train_bytes=200000", "optimizer.scale=false", "optimizer.matrix_lr=0.01",
            "schedule=constant", "hardware=cpu", "hardware.threads=1", "train.precision=fp32", "train.seq_len=32",
            "train.total_batch_size=256", "train.max_steps=12", "train.eval_every=6", "train.eval_tokens=2048",
            "train.sample_every=0", "sampling.max_tokens=8", f"run.dir={run_dir}", f"run.cache_dir={cache}",
        ]  # fmt: skip
        return [*base, *more]

    return overrides


# Half of a tiny run's time goes into imports. Commands are therefore forked from a process that has them behind it: each still is a
# process of its own, and those that `start` gives, or that want an environment of their own, begin with an empty interpreter.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["picotrain.cli.commands", "picotrain.loop", "picotrain.launch.agent", "torch._dynamo", "torch.distributed.checkpoint.hf_storage",
     "torch.distributed.checkpoint.state_dict_saver", "matplotlib.backends.backend_agg", "matplotlib.figure", "hydra", "pyarrow.parquet"]
)  # fmt: skip
TIMEOUT_S = 240


def picotrain(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "picotrain", *arguments]
    if options:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, **options)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = FORKED.Process(target=_run_command, args=(arguments, dict(os.environ), os.getcwd(), out, err))
        process.start()
        process.join(TIMEOUT_S)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, TIMEOUT_S, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(command, process.exitcode, out.read_text(), err.read_text())


def _run_command(arguments: Sequence[str], environment: dict[str, str], folder: str, out: Path, err: Path) -> None:
    """What `python -m picotrain` does, in a forked process."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["picotrain", *arguments]
    from picotrain.cli import main

    main()


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start the command and do not wait for it."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-m", "picotrain", *arguments], **(streams | options))


def lines(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, of one kind or all."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if kind in (None, record["kind"])]


def losses(run_dir: Path) -> list[float]:
    """The training loss of every step, checked to be there once each and in order."""
    train = lines(run_dir, "train")
    assert [record["step"] for record in train] == list(range(len(train)))
    return [record["loss"] for record in train]


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def benchmark(name: str) -> Any:
    """The script benchmarks/NAME.py as a module."""
    from picotrain import bench

    return bench.load(str(BENCHMARKS / f"{name}.py"))


@pytest.fixture(autouse=True)
def _no_cache_of_the_user(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """No test reads or writes the cache of whoever runs it."""
    monkeypatch.setenv("PICOTRAIN_CACHE", str(cache))
    os.environ.pop("HF_TOKEN", None)
