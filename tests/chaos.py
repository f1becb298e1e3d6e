"""Kills a real run and looks at what is left: processes are found by a mark in their environment, moments by the run directory."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import lines, losses, picotrain

from picotrain import checkpoint

POLL_S = 0.002  # a save of the tiny model takes 50 ms
LIMIT_S = 600.0  # for one moment to come
TRIES = 8  # for a kill to fall into its phase: some are short, and the run may end before
# How far into a phase its kill may fall, less at every further try. Where it is over by then the kill counts for what it hit, and
# another is tried.
DEPTH_S = {"start-up": 4.0, "compilation": 8.0, "evaluation": 0.1, "sampling": 0.1, "saving": 0.04, "training": 0.02, "ending": 2.0}

# Loaded by every Python below a run as `sitecustomize`: ends its process by SIGKILL at the CHAOS_COUNT-th change of a file below
# CHAOS_FOLDER that matches CHAOS_OPERATION, once. Where a file is opened to be written anew it is emptied first or not, by
# CHAOS_TORN: the state between open() and write(). Every change is noted in CHAOS_LOG.
INJECTOR = r"""
import os, re, signal, sys
folder, log, spent = (os.environ[name] for name in ("CHAOS_FOLDER", "CHAOS_LOG", "CHAOS_SPENT"))
wanted, left = re.compile(os.environ["CHAOS_OPERATION"]), int(os.environ["CHAOS_COUNT"])
torn = os.environ["CHAOS_TORN"] == "1"
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}

def note(path, text):
    os.write(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), text.encode())

def hook(event, args):
    global left
    if event == "open":
        if not isinstance(args[2], int) or not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
    elif event not in CHANGES:
        return
    path = args[0] if not isinstance(args[0], int) else os.readlink(f"/proc/self/fd/{args[0]}")
    path = os.fsdecode(path)
    if not path.startswith(folder + "/") or path.endswith(".lock"):
        return
    operation = f"{event} {path[len(folder) + 1:]}"
    note(log, operation + "\n")
    if not wanted.fullmatch(re.sub("[0-9a-f]{16}|[0-9]+", "N", operation)):
        return
    left -= 1
    if left or os.path.exists(spent):
        return
    note(spent, operation)
    if torn and event == "open" and args[2] & os.O_TRUNC:
        os.open(path, args[2], 0o644)
    os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
"""


@dataclass(frozen=True)
class Kill:
    """One kill: when (a phase, "random", or a file's "operation") and who (the whole "tree", one "rank", the "launcher" alone)."""

    at: str
    victim: str = "tree"
    operation: str = ""
    count: int = 1
    torn: bool = False


@dataclass(frozen=True)
class Hit:
    """A kill that was carried out, and what the run was doing by the files it left."""

    kill: Kill
    phases: frozenset[str]


@dataclass(frozen=True)
class Reference:
    """The undisturbed run: where, how long it took, and the kinds of changes it made to files, in order."""

    run: Path
    seconds: float
    operations: tuple[str, ...]


def reference(folder: Path, words: Sequence[str], **variables: str) -> Reference:
    """Train undisturbed in folder/run."""
    folder.mkdir()
    begun_s = time.monotonic()
    variables = environment(folder, Kill("operation"), "none") | variables
    done = picotrain("train", *words, f"run.dir={folder / 'run'}", env=variables)
    assert done.returncode == 0, done.stderr
    return Reference(folder / "run", time.monotonic() - begun_s, operations(folder))


def environment(folder: Path, kill: Kill, mark: str) -> dict[str, str]:
    """Of a run below `folder`: marked, with the injector where the kill is at a file's operation."""
    if kill.at != "operation":
        return os.environ | {"CHAOS_MARK": mark}
    (folder / "inject").mkdir(exist_ok=True)
    (folder / "inject" / "sitecustomize.py").write_text(INJECTOR)
    log, spent = folder.with_suffix(".log"), folder.with_suffix(".spent")
    spent.unlink(missing_ok=True)
    return os.environ | {
        "CHAOS_MARK": mark, "CHAOS_FOLDER": str(folder), "CHAOS_LOG": str(log), "CHAOS_SPENT": str(spent),
        "CHAOS_OPERATION": kill.operation, "CHAOS_COUNT": str(kill.count), "CHAOS_TORN": str(int(kill.torn)),
        "PYTHONPATH": os.pathsep.join([str(folder / "inject"), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip


def operations(folder: Path) -> tuple[str, ...]:
    """The kinds of changes that runs below `folder` made to files, numbers and hashes left out, in the order of the first of each."""
    noted = re.sub("[0-9a-f]{16}|[0-9]+", "N", folder.with_suffix(".log").read_text()).splitlines()
    return tuple(dict.fromkeys(noted))


def marked(mark: str) -> dict[int, str]:
    """Every live process with this mark: pid -> rank, "" for what is no worker."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and f"CHAOS_MARK={mark}\0".encode() in (variables := (entry / "environ").read_bytes()):
                rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", variables)
                found[int(entry.name)] = rank[1].decode() if rank else ""
    return found


class Eye:
    """Tells from the run directory alone what a run is doing; `mark` says that what is there now is of the past."""

    def __init__(self, run: Path, words: Sequence[str]):
        self.run = run
        value = dict(word.split("=", 1) for word in words)
        self._last, self._compiled = int(value["train.max_steps"]), value.get("hardware.compile") == "true"
        self._due = {"val": int(value["train.eval_every"]), "sample": int(value["train.sample_every"])}
        self.mark()

    def mark(self) -> None:
        self._old_folders, self._old_time = self._temporary(), self._metrics_time()

    def phases(self) -> frozenset[str]:
        """What the loop does, and "saving" where that goes on in the background."""
        saving = {"saving"} if self._temporary() - self._old_folders else set()
        return frozenset({self._phase(), *saving})

    def _phase(self) -> str:
        """creation, start-up, compilation, evaluation, sampling, ending, or training."""
        if not (self.run / "config.yaml").exists():
            return "creation"
        records = self._records()
        if self._metrics_time() == self._old_time or not records:
            return "start-up"
        if records[-1].get("name") == "finished":
            return "ending"
        if self._compiled and not any(record["kind"] == "train" for record in records):
            return "compilation"
        step = max(record["step"] + (record["kind"] == "train") for record in records)
        done = {record["kind"] for record in records if record["step"] == step}
        for kind, phase in (("val", "evaluation"), ("sample", "sampling")):
            due = step == self._last or (step % self._due[kind] == 0 and (step > 0 or kind == "val"))
            if due and kind not in done:
                return phase
        return "training"

    def _temporary(self) -> set[tuple[str, int, int]]:
        found = set()
        for path in (self.run / "checkpoints").glob(".tmp-*"):
            with suppress(OSError):
                found.add((path.name, path.stat().st_ino, path.stat().st_ctime_ns))
        return found

    def _metrics_time(self) -> int:
        try:
            return (self.run / "metrics.jsonl").stat().st_mtime_ns
        except OSError:
            return 0

    def _records(self) -> list[dict[str, Any]]:
        """The last records, no further back than the attempt's first, without those of saves, which come when they like."""
        try:
            tail = (self.run / "metrics.jsonl").read_bytes().split(b"\n")[:-1][-12:]
        except OSError:
            return []
        records = [record for record in map(json.loads, tail) if record["kind"] != "checkpoint"]
        begins = [i for i, record in enumerate(records) if record.get("name") in ("started", "resumed")]
        return records[begins[-1] :] if begins else records


class Chaos:
    """Runs that are killed and resumed until they end, each compared with the undisturbed one."""

    def __init__(self, folder: Path, words: Sequence[str], undisturbed: Callable[[], Reference], rng: random.Random, **variables: str):
        folder.mkdir()
        self.folder, self.words, self.undisturbed, self.rng, self.variables = folder, tuple(words), undisturbed, rng, variables
        self.hits: list[Hit] = []
        self.finished = 0
        self.mark = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        self._new_run()

    def __str__(self) -> str:
        counts = Counter(f"{hit.kill.victim} in {' and '.join(sorted(hit.phases))}" for hit in self.hits)
        listing = ", ".join(f"{count} x {what}" for what, count in sorted(counts.items()))
        return f"{len(self.hits)} kills ({listing}), {self.finished} runs compared"

    def operations(self) -> tuple[str, ...]:
        """The kinds of changes that were made to files so far, wherever a kill waited for one."""
        return operations(self.folder)

    def carry_out(self, kills: Iterable[Kill], before: Kill | None = None) -> None:
        """Every kill, in its phase; then the last run goes on to its end. before: a kill that comes ahead of each try."""
        try:
            for kill in kills:
                tries = 0
                while (before and not self._carried_out(before)) or not self._carry_out(kill, tries):
                    tries += 1
                    assert tries < TRIES, f"{kill} did not come about in {tries} tries: {self}"
            self._end()
        finally:
            self._kill(marked(self.mark))

    def _carried_out(self, kill: Kill) -> bool:
        return any(self._carry_out(kill, tries) for tries in range(TRIES))

    def _carry_out(self, kill: Kill, tries: int) -> bool:
        """Whether the kill fell where it should. The run that it should have met may have ended: then the next one is begun."""
        if self._process is None:
            self._start(kill)
        assert self._process
        if not self._until(self._moment(kill, tries)):
            self._end()
            return False
        if kill.at in DEPTH_S:
            limit_s = time.monotonic() + self.rng.random() * DEPTH_S[kill.at] / (1 + tries)
            self._until(lambda: time.monotonic() > limit_s)
        if self._process.poll() is not None and kill.at != "operation":
            self._end()
            return False
        if kill.victim == "rank":
            return self._kill_rank(kill)
        self._kill([self._process.pid] if kill.victim == "launcher" else marked(self.mark))
        self._process.wait()
        self._process = None
        return self._fell_right(kill)

    def _moment(self, kill: Kill, tries: int) -> Callable[[], bool]:
        if kill.at == "random":
            at_s = time.monotonic() + self.rng.random() * self.undisturbed().seconds / (1 + tries)  # sooner where the run has ended before
            return lambda: time.monotonic() > at_s
        if kill.at == "operation":
            return self.folder.with_suffix(".spent").exists
        return lambda: kill.at in self.eye.phases()

    def _kill_rank(self, kill: Kill) -> bool:
        """Kill one of the workers, as soon as there are any, and wait until all are new."""
        workers: set[int] = set()

        def there() -> bool:
            workers.update(pid for pid, rank in marked(self.mark).items() if rank)
            return bool(workers)

        if not self._until(there):  # the run has just ended
            return False
        self._kill([self.rng.choice(sorted(workers))])
        right = self._fell_right(kill)
        self.eye.mark()
        self._until(lambda: not workers & (now := marked(self.mark)).keys() and len(list(filter(None, now.values()))) >= 2)
        return right

    def _fell_right(self, kill: Kill) -> bool:
        """Note where a kill fell by what it left, and whether it should have."""
        self.hits.append(Hit(kill, self.eye.phases()))
        return kill.at in {"random", "operation", *self.hits[-1].phases}

    def _kill(self, pids: Iterable[int]) -> None:
        """By SIGKILL, and of a whole tree also what was started meanwhile."""
        whole = isinstance(pids, dict)
        while pids:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self._process:
                self._process.poll()
            pids = marked(self.mark) if whole else []

    def _start(self, kill: Kill) -> None:
        """The same command again or `resume`, as a user would; where the run is not yet one, the same command."""
        command = ["train", *self.words, f"run.dir={self.run}"]
        if (self.run / "config.yaml").exists() and self.rng.random() < 0.5:
            command = ["resume", str(self.run)]
        self.eye.mark()
        with (self.folder / "output.txt").open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "picotrain", *command],
                stdout=output,
                stderr=output,
                env=environment(self.folder, kill, self.mark) | self.variables,
                start_new_session=True,
            )

    def _until(self, condition: Callable[[], bool]) -> bool:
        """Whether the condition came true before the process ended."""
        assert self._process
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            if self._process.poll() is not None:
                return condition()
            assert time.monotonic() < deadline, f"the moment did not come: {self._told()}"
            time.sleep(POLL_S)
        return True

    def _end(self) -> None:
        """See the run to its end, compare it, begin another."""
        if self._process is None:
            self._start(Kill("end"))
        assert self._process
        code = self._process.wait(LIMIT_S)
        assert code == 0, f"exit code {code}: {self._told()}"
        self._process = None
        deadline = time.monotonic() + 30
        while left := marked(self.mark):
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.05)
        assert_identical(self.undisturbed().run, self.run)
        self.finished += 1
        self._new_run()

    def _new_run(self) -> None:
        self.run = self.folder / f"run{self.finished}"
        self.eye = Eye(self.run, self.words)

    def _told(self) -> str:
        history = "\n".join(map(str, self.hits[-6:]))
        return f"{self}\n{history}\n{(self.folder / 'output.txt').read_text(errors='replace')[-4000:]}"


MEASURED = ("step", "loss", "smooth_loss", "lr", "lr_factor", "grad_norm", "skipped", "tokens", "epoch", "pq", "rg", "rank", "world_size")


def assert_identical(undisturbed: Path, run: Path) -> None:
    """Everything that a run computes, to the bit and once each; and nothing half-done is left."""
    assert losses(run) == losses(undisturbed)
    chosen = {"train": MEASURED, "val": ("step", "val_bpb", "val_loss", "tokens"), "sample": ("step", "samples")}
    for kind, keys in chosen.items():
        ours, theirs = ([[record[key] for key in keys] for record in lines(folder, kind)] for folder in (run, undisturbed))
        assert ours == theirs, kind
    assert [record["name"] for record in lines(run, "event")].count("finished") == 1
    paths = [folder / "checkpoints" for folder in (undisturbed, run)]
    there = [checkpoint.complete(root) for root in paths]
    theirs, ours = ([path.name for path in found if not checkpoint.is_rolling(path)] for found in there)
    assert ours == theirs
    # Rolling ones: one that was the best when the last was saved, one that a kill kept from being removed.
    assert len(there[1]) <= len(ours) + 2
    for name in ("latest", "best"):
        assert len({(root / name).read_text() for root in paths}) == 1, name
    for step in ours:
        assert_same_checkpoint(*(root / step for root in paths))
    done = picotrain("doctor", str(run))
    assert done.returncode == 0 and done.stdout.count("whole") == len(there[1]), done.stdout + done.stderr
    stale = [path for path in run.rglob("*") if path.name.startswith((".tmp", ".trash")) or path.name.endswith(".tmp")]
    assert not stale, stale
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"


def assert_same_checkpoint(a: Path, b: Path) -> None:
    """Weights, moments, loader, loop state and what was measured."""
    for part in ("model", "optimizer"):
        ours, theirs = checkpoint.load_tensors(a, part), checkpoint.load_tensors(b, part)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    states = []
    for path in (a, b):
        state = checkpoint.read_state(path)
        # Events and seconds differ, and torch's own random state, which a new process draws and training does not use.
        del state["metrics_bytes"], state["loop_state"]["total_training_time"], state["rng"]
        states.append(state)
    assert states[0] == states[1]
    assert checkpoint.read_metrics(a) == checkpoint.read_metrics(b)
