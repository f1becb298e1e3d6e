"""How this process was started, so that its user is told what to type next in the words that work in this shell."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

COMMAND = "PICOTRAIN_COMMAND"  # set by picotrain.launch: its workers were not typed by anybody
NAME = "picotrain"


def command() -> str:
    """What `picotrain` has to be typed as: its name where the shell finds this one by it, else as it was started."""
    if given := os.environ.get(COMMAND):
        return given
    here, script = Path(sys.executable).parent, Path(sys.argv[0])
    found = shutil.which(NAME)
    if found and (_same(Path(found).resolve().parent, here) or _same(Path(found), script)):
        return NAME
    if script.name == NAME and script.is_file():
        return typed(script, program=True)
    return f"{_python()} -m {NAME}"


def resume(run_dir: Path) -> str:
    """The command that goes on with a run. Started by torchrun, it is torchrun's; on several nodes each of them has to have it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or COMMAND in os.environ:
        return f"{command()} resume {typed(run_dir)}"
    torchrun = "torchrun" if shutil.which("torchrun") else f"{_python()} -m torch.distributed.run"
    return f"{torchrun} --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', '1')} -m picotrain.worker {typed(run_dir)}"


def opening(path: Path) -> str:
    """The command that opens a file in the desktop's own program; "" where there is no desktop, as over ssh."""
    remote = any(os.environ.get(key) for key in ("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY"))
    desktop = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    program = "open" if sys.platform == "darwin" else "xdg-open"
    return f"{program} {typed(path)}" if desktop and not remote and shutil.which(program) else ""


def shown(path: Path, *, program: bool = False) -> str:
    """A path as short as it can be: relative to the current folder where it is below that. A program keeps a slash, and nothing
    looks like an option."""
    try:
        short = str(path.absolute().relative_to(Path.cwd()))
    except (ValueError, OSError):  # elsewhere; the current folder is gone
        return str(path)
    return f"./{short}" if short.startswith("-") or (program and os.sep not in short) else short


def typed(path: Path, *, program: bool = False) -> str:
    """A path as the shell takes it."""
    return shlex.quote(shown(path, program=program))


def _python() -> str:
    """The interpreter as it was typed, where the shell finds it so."""
    python = sys.orig_argv[0] if sys.orig_argv and shutil.which(sys.orig_argv[0]) else sys.executable
    return typed(Path(python), program=True) if os.sep in python else shlex.quote(python)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
