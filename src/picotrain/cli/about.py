"""What `--help` says of groups and keys. The choices are the files in conf/: to ask the config for them would take --help a second."""

from __future__ import annotations

import re
from pathlib import Path

USUAL = {  # the choice that comes first in the list of each group
    "model": "d2", "data": "auto", "tokenizer": "bpe", "optimizer": "adamw", "schedule": "trapezoid", "cadence": "default",
    "hardware": "auto", "parallel": "ddp", "logger": "default", "experiment": "cpu_d4",
}  # fmt: skip


def group_choices(group: str) -> str:
    """The choices of a group, the usual first. 1x and 8x of a GPU are told as {1,8}x{a100,h100}."""
    package = Path(__file__).resolve().parents[1]
    folder = next(root / "conf" / group for root in (package, package.parents[1]) if (root / "conf").is_dir())
    names = sorted((path.stem for path in folder.glob("*.yaml")), key=_natural)
    names.sort(key=lambda name: name != USUAL[group])
    several = [name.partition("x")[2] for name in names if re.match("8x", name)]
    shown = [name for name in names if name.partition("x")[2] not in several or not name[0].isdigit()]
    return " ".join([*shown, *([f"{{1,8}}x{{{','.join(several)}}}"] if several else [])])


def _natural(name: str) -> list[tuple[int, str]]:
    """d4 before d12, and names without a number before those with one."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


KEYS = {
    "train.max_steps=500": "how long; or num_train_epochs, target_tokens",
    "train.seq_len=1024": "tokens a row",
    "train.total_batch_size=65536": "tokens a step",
    "train.device_batch_size=8": "rows at once on a device",
    "train.eval_every=100": "steps between validations",
    "train.save_every=1000": "steps between permanent checkpoints",
    "train.precision=bf16": "auto, fp32, bf16 or fp8",
    "optimizer.matrix_lr=0.02": "learning rate; embed_lr and head_lr, too",
    "schedule.warmup_steps=100": "steps until the full rate",
    "data.path=~/texts": "with data=files: a file, folder or URL",
    "tokenizer.vocab_size=16384": "tokens in the vocabulary",
    "hardware.device=cpu": "or cuda, mps",
    "run.name=mine": "the folder in runs/",
    "run.seed=1": "weights and order of the rows",
}
# "\b": click leaves the lines that follow as they are
EPILOG = "\n".join(
    [
        "\b",
        "Groups and their choices (model=d6):",
        *(f"  {group:<11} {group_choices(group)}" for group in USUAL),
        "",
        "\b",
        "Keys, the most used (`picotrain config` prints all of them with their values):",
        *(f"  {key:<29} {what}" for key, what in KEYS.items()),
    ]
)
