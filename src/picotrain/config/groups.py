"""The config groups: where their files are, which choices there are, whether a user's own folder is usable."""

from __future__ import annotations

from pathlib import Path

from picotrain import parts
from picotrain.config.keys import nearest, owners
from picotrain.errors import Problem

GROUPS = ("model", "data", "tokenizer", "optimizer", "schedule", "cadence", "hardware", "parallel", "logger", "experiment")


def conf_dir() -> Path:
    """The folder of the built-in groups: inside the package when installed, at the top of the repository otherwise."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parents[1] / "conf"


def choices(group: str, config_dir: Path | None = None) -> list[str]:
    """The choices of a group, those of installed packages and the user's own last; numbers in names sort as numbers (d4 before d12)."""
    names = []
    for root in (conf_dir(), *parts.conf_dirs(), config_dir):
        folder = root / group if root else None
        if folder and folder.is_dir():
            found = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
            names += sorted(found, key=lambda name: (len(name), name) if name[-1:].isdigit() else (0, name))
    return names


def unknown_choice(group: str, choice: str, config_dir: Path | None = None) -> Problem:
    """The problem of a choice that does not exist."""
    known = choices(group, config_dir)
    near = nearest(choice, known)
    hint = (f"nearest: {', '.join(near)}; " if near else "") + f"all: {', '.join(known)}"
    return Problem(f"{group}={choice}", f"no such choice in group '{group}'", hint)


def of_another_kind(key: str, kind: str, hint: str = "") -> Problem:
    """The problem of a key that only parts of other kinds have. hint: what would be right; "": to choose one of those."""
    section, others = key.partition(".")[0], owners(key)
    rule = f"is read for {section}.kind={' or '.join(others)} only, and this is {kind}"
    named = section if others[0] in choices(section) else f"{section}.kind"  # a choice brings what its kind needs
    return Problem(key, rule, hint or f"add {named}={others[0]}")


def check_config_dir(config_dir: Path) -> list[Problem]:
    """What keeps a user's own config folder from being used."""
    where = str(config_dir)
    if not config_dir.is_dir():
        return [Problem(where, "the config folder does not exist" if not config_dir.exists() else "is not a folder")]
    if not any((config_dir / group).is_dir() for group in GROUPS):
        return [
            Problem(where, "has no folder of a config group", f"groups: {', '.join(GROUPS)}; e.g. {config_dir / 'model' / 'mine.yaml'}")
        ]
    return [
        Problem(
            str(config_dir / group / f"{name}.yaml"),
            f"has the name of the built-in {group}={name}",
            "rename it, so that the choice means one thing",
        )
        for group in GROUPS
        for name in choices(group)
        if (config_dir / group / f"{name}.yaml").is_file()
    ]
