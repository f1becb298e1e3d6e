"""Real runs that are killed again and again and resumed end as if nobody had touched them.

    CHAOS_SEED=123 .venv/bin/python -m pytest -n 0 -m "slow or not slow" tests/test_chaos.py -rP     # the same kills; says where they fell

The seed is printed when a test fails. It fixes which kills come and how late, not the speed of the machine.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chaos import Chaos, Kill, reference

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found through /proc"),
    pytest.mark.timeout(1200),
]

# Every phase takes about a tenth of a second, a save writes some twenty files, and evaluation, samples and saves come at different steps.
WORDS = (
    "train.eval_tokens=8192", "evaluation.bpb.device_batch_size=2", "train.sample_every=7", "sampling.max_tokens=96",
    "checkpoint.shard_bytes=150000",
)  # fmt: skip
LONG = (*WORDS, "train.max_steps=60", "train.eval_every=5", "train.save_every=8")
TWO = ("hardware.nproc_per_node=2", "train.device_batch_size=4")
ROLLING = "checkpoint.rolling_minutes=0.001"  # less than lies between two permanent ones, on a fast machine, too

PHASES = ("start-up", "evaluation", "sampling", "saving", "ending")
FULL = {
    "alone": [Kill(phase) for phase in (*PHASES, "saving", "saving")] + [Kill("random")] * 12,
    "two": [Kill(phase, victim) for phase in ("evaluation", "saving", "sampling") for victim in ("tree", "launcher")]
    + [Kill("random"), Kill("random", "launcher")] * 3,
    "restarts": [Kill(phase, "rank") for phase in ("evaluation", "saving", "sampling", "start-up", "saving")]
    + [Kill("random", "rank")] * 7,
    "compiled": [Kill("compilation"), Kill("compilation", "launcher"), Kill("compilation"), Kill("saving"), Kill("evaluation")],
}
OPERATIONS = 40  # kinds of changes to files that a run makes, at least


@pytest.fixture
def rng() -> random.Random:
    seed = os.environ.get("CHAOS_SEED") or str(secrets.randbelow(10**9))
    print(f"CHAOS_SEED={seed}")
    return random.Random(seed)


def hit_phases(chaos: Chaos) -> set[str]:
    """Where the kills fell, by what they left."""
    print(chaos)
    return {phase for hit in chaos.hits for phase in hit.phases}


def test_a_run_killed_in_every_phase_ends_as_if_undisturbed(tmp_path: Path, tiny: Callable[..., list[str]], rng: random.Random):
    words = tiny(tmp_path, *WORDS, "train.max_steps=26", "train.eval_every=10", "train.save_every=8")
    kills = [
        Kill("operation", operation="open runN/.*plan.json.*", torn=True), *map(Kill, ("saving", "evaluation", "sampling", "ending")),
    ]  # fmt: skip
    with ThreadPoolExecutor() as pool:  # on the other core
        undisturbed = pool.submit(reference, tmp_path / "reference", words)
        chaos = Chaos(tmp_path / "chaos", words, undisturbed.result, rng)
        chaos.carry_out(kills)
    assert hit_phases(chaos) >= {"creation", "saving", "evaluation", "sampling", "ending"}
    assert len(chaos.hits) >= 5 and chaos.finished >= 1


def test_a_full_pass_is_at_least_fifty_kills():
    assert sum(map(len, FULL.values())) + OPERATIONS >= 50


def full(tmp_path: Path, words: list[str], rng: random.Random, name: str, *more: str, **variables: str) -> Chaos:
    """Carry out the kills of FULL[name] in a seeded order; `more`: what only the disturbed run has."""
    undisturbed = reference(tmp_path / "reference", words, **variables)
    chaos = Chaos(tmp_path / "chaos", [*words, *more], lambda: undisturbed, rng, **variables)
    chaos.carry_out(rng.sample(FULL[name], len(FULL[name])))
    assert hit_phases(chaos) >= {kill.at for kill in FULL[name]} - {"random"}
    assert len(chaos.hits) >= len(FULL[name])
    return chaos


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_undisturbed(tmp_path: Path, tiny: Callable[..., list[str]], rng: random.Random):
    full(tmp_path, tiny(tmp_path, *LONG), rng, "alone", ROLLING)


@pytest.mark.slow
def test_two_ranks_killed_together_or_by_their_launchers_death_end_as_if_undisturbed(tmp_path: Path, tiny, rng: random.Random):
    full(tmp_path, tiny(tmp_path, *LONG, *TWO), rng, "two")


@pytest.mark.slow
def test_ranks_that_are_killed_one_by_one_come_back_and_end_as_if_undisturbed(tmp_path: Path, tiny, rng: random.Random):
    full(tmp_path, tiny(tmp_path, *LONG, *TWO), rng, "restarts", "launch.max_restarts=100")


@pytest.mark.slow
def test_a_run_killed_while_it_compiles_ends_as_if_undisturbed(tmp_path: Path, tiny, rng: random.Random):
    """The cache of compiled code is the disturbed run's own, and cold: what a kill left in it is there at the resume."""
    words = tiny(tmp_path, *LONG, "hardware.compile=true")
    undisturbed = reference(tmp_path / "reference", words, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "reference-code"))
    chaos = Chaos(tmp_path / "chaos", words, lambda: undisturbed, rng, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "chaos-code"))
    chaos.carry_out(FULL["compiled"])
    assert hit_phases(chaos) >= {"compilation", "saving", "evaluation"}
    assert len(chaos.hits) >= len(FULL["compiled"])


@pytest.mark.slow
def test_a_run_killed_at_every_kind_of_change_to_its_files_ends_as_if_undisturbed(tmp_path: Path, tiny, rng: random.Random):
    """At the creation of the run and its cache, at a resume, while saving and at the end; a file that is written anew is left empty."""
    words = [word for word in tiny(tmp_path, *LONG) if not word.startswith("run.cache_dir=")]

    def own(name: str) -> list[str]:
        return [*words, f"run.cache_dir={tmp_path / name / 'cache'}"]

    undisturbed = reference(tmp_path / "reference", own("reference"))
    known = [re.sub(" run(?=/|$)", " runN", operation) for operation in undisturbed.operations]
    begins = known.index("open runN/metrics.jsonl")
    again = [
        operation for operation in known[:begins] if " runN/" in operation and "tokenizer" not in operation and operation[-4:] != "runN"
    ]
    chaos = Chaos(tmp_path / "chaos", [*own("chaos"), ROLLING], lambda: undisturbed, rng)
    chaos.carry_out([*at(known[:begins]), Kill("saving"), *at(again), *at(known[begins:])])
    for kill in at(sorted(set(chaos.operations()) - set(known))):  # what only a disturbed run does
        chaos.carry_out([kill], before=Kill("training"))  # so that there is something to cut; the first save is at step 0
    assert len(known) >= OPERATIONS and len(chaos.hits) >= len(known) + len(again)
    assert hit_phases(chaos) >= {"creation", "start-up", "saving", "ending"}


def at(operations: Iterable[str]) -> list[Kill]:
    """A kill at the first of each of these changes."""
    return [Kill("operation", operation=re.escape(operation), torn=True) for operation in operations]
