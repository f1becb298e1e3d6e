"""Which benchmarks `picotrain bench` runs, and with which options on which machine. No torch."""

from __future__ import annotations

from typing import NamedTuple

from picotrain import hardware
from picotrain.hardware import Machine


class Task(NamedTuple):
    """A benchmark with its options."""

    name: str
    arguments: list[str]


GPU_STEP = ["--device", "cuda", "--seq-len", "2048", "--vocab", "32768", "--batch", "auto", "--steps", "20", "--warmup", "5"]


def tasks(names: list[str], full: bool, machine: Machine) -> list[Task]:
    """The set, or what it has of these names; a name that only the full set has, from there. When named: core and peers, which need
    what is the user's to bring, and busy, which wants a quiet machine to make it busy."""
    chosen = full_set(machine) if full else quick_set(machine)
    if not names:
        return chosen
    everything = [*full_set(machine), Task("core", ["--device", machine.device]), Task("peers", []), Task("busy", [])]
    return [task for name in names for task in [t for t in chosen if t.name == name] or [t for t in everything if t.name == name]]


def quick_set(machine: Machine) -> list[Task]:
    """About two minutes on two cores."""
    depth = ["--depth", "12", *GPU_STEP] if machine.device == "cuda" else ["--depth", "4"]
    return [
        Task("matmul", ["--device", machine.device]),
        Task("step", [*depth, *best_mode(machine)]),
        Task("loader", ["--seconds", "3"]),
        Task("checkpoint", ["--depth", "4", "--saves", "3", "--signals", "0"]),
        Task("sampling", ["--device", machine.device, "--threads", str(machine.cores), "--repeats", "2"]),
    ]


def full_set(machine: Machine) -> list[Task]:
    """All that needs no files of the user, in more settings and with repeats."""
    sampling = ["--device", machine.device, "--threads", str(machine.cores)]
    precisions = ["fp32", "bf16"] if machine.fast_bf16 else ["fp32"]
    return [
        Task("matmul", ["--device", machine.device]),
        *_full_steps(machine),
        _memory(machine),
        _variants(machine),
        Task("loader", []),
        Task("loader", ["--short"]),
        Task("checkpoint", []),
        *(Task("sampling", [*sampling, "--precision", precision]) for precision in precisions),
        Task("startup", ["--device", machine.device]),
        Task("time_to_bpb", ["--recipes", "fast"]),
        Task("corpus", []),
    ]


def _full_steps(machine: Machine) -> list[Task]:
    if machine.device == "cuda":
        return [
            Task("step", ["--depth", "12", "20", *GPU_STEP, *best_mode(machine), "--repeats", "3"]),
            Task("step", ["--depth", "20", *GPU_STEP, *best_mode(machine), "--optimizer", "muon", "--grad-accum", "4", "--repeats", "3"]),
        ]
    return [Task("step", []), Task("step", ["--depth", "4", "6", *best_mode(machine), "--repeats", "3"])]


def _memory(machine: Machine) -> Task:
    precision = ["--precision", "fp32", *["bf16"] * machine.fast_bf16]
    if machine.device == "cuda":
        sizes = ["--depth", "12", "20", "--seq-len", "2048", "--vocab", "32768", "--batch", "4", "16", "--compile", "false", "true"]
        return Task("memory", ["--device", "cuda", *sizes, *precision])
    return Task("memory", ["--batch", "2", "8", *precision])


def _variants(machine: Machine) -> Task:
    size = ["--depth", "12", "--seq-len", "2048", "--vocab", "32768", "--batch", "16"] if machine.device == "cuda" else []
    return Task("variants", ["--device", machine.device, *size])


def best_mode(machine: Machine) -> list[str]:
    """How the training step is fastest there: bf16 where the device is fast at it, compiled where that can be done."""
    precision = ["--precision", "bf16"] if machine.fast_bf16 else []
    return [*precision, "--compile"] if machine.device == "cuda" or hardware.has_compiler() else precision
