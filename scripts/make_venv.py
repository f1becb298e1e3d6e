"""Make or refresh the .venv of this checkout: make_venv.py [extra ...]. Called by setup.sh, which explains the environment variables.

Standard library only. The stamp in .venv says what was installed; it is emptied before an install and written last, so that an interrupted
set-up is seen and done again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "picotrain-setup.json"
INPUTS = ("pyproject.toml", "constraints.txt")
TORCH_WHEELS = "https://download.pytorch.org/whl"
SOURCE = ROOT / "src"
THIS_PYTHON = "{}.{}".format(*sys.version_info)

Stamp = dict[str, Any]


def say(message: str) -> None:
    text = f"set-up: {message}"
    if sys.stderr.isatty():  # a word is never cut: a path or a command stays whole to be copied
        columns = max(shutil.get_terminal_size().columns, 40)
        text = textwrap.fill(text, columns, subsequent_indent="        ", break_long_words=False, break_on_hyphens=False)
    print(text, file=sys.stderr, flush=True)


def read_stamp() -> Stamp | None:
    """What was installed; empty when that did not end; None for no .venv, or one that this script did not make."""
    try:
        return json.loads(STAMP.read_text())
    except OSError:
        return None
    except ValueError:
        return {}


def wanted_stamp(stamp: Stamp | None, extras: list[str]) -> Stamp:
    """What should be installed: nothing that is there already is taken away, choices of an earlier set-up stay until named anew."""
    old = stamp or {}
    return {
        "venv": str(VENV),
        "inputs": hashlib.sha256(b"\0".join((ROOT / name).read_bytes() for name in INPUTS)).hexdigest(),
        "extras": sorted({*extras, *old.get("extras", [])}),
        "torch": os.environ.get("PICOTRAIN_TORCH") or old.get("torch", "torch"),
        "index_url": os.environ.get("PICOTRAIN_INDEX_URL") or old.get("index_url", ""),
    }


def venv_python() -> str | None:
    """Version (such as 3.12) of the interpreter in .venv; None if it does not run."""
    command = [PYTHON, "-c", "import sys; print('{}.{}'.format(*sys.version_info))"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def why_remake(stamp: Stamp | None, version: str | None) -> str | None:
    """Why .venv cannot be used as it is, or None."""
    if not VENV.exists():
        return "there is none yet"
    if version is None:
        return "its Python is gone"
    if os.environ.get("PICOTRAIN_PYTHON") and version != THIS_PYTHON:
        return f"it has Python {version}, PICOTRAIN_PYTHON is {THIS_PYTHON}"
    if stamp is None:
        return None  # made by hand: installed into, not thrown away
    if not stamp:
        return "the last set-up did not end"
    if stamp["venv"] != str(VENV):
        return "it was made in another place"
    if stamp["python"] != version:
        return f"its Python changed from {stamp['python']} to {version}"
    return None


def why_refresh(stamp: Stamp | None, wanted: Stamp) -> str | None:
    """Why something has to be installed into a usable .venv, or None."""
    if stamp is None:
        return "it was not made by this script"
    if stamp["inputs"] != wanted["inputs"]:
        return " or ".join(INPUTS) + " changed"
    if stamp["extras"] != wanted["extras"]:
        return "it lacks " + ", ".join(set(wanted["extras"]) - set(stamp["extras"]))
    if (stamp["torch"], stamp["index_url"]) != (wanted["torch"], wanted["index_url"]):
        return "another torch was asked for"
    return None


def torch_builds() -> list[str]:
    """PyTorch's builds that this machine can use, the best first: by its NVIDIA driver's version and its GPU, else that for a CPU."""
    sys.path.insert(0, str(SOURCE))
    from picotrain import hardware  # standard library only

    if (machine := hardware.detect()).device != "cuda":
        return ["cpu"]
    version, cuda = hardware.driver()
    if not (builds := hardware.torch_builds(cuda, machine.compute_capability)):
        say(f"the NVIDIA driver (version {version or 'unknown'}) is too old for any torch that will do; 525 is the first that is not")
    return builds


def extra_index(wanted: Stamp) -> list[str]:
    """pip's arguments for the index with the right build of torch. One that cannot be reached, or does not have this version, is left
    out: pip would retry for minutes, or take another build."""
    if wanted["index_url"]:
        return ["--extra-index-url", wanted["index_url"]]
    user_named_one = any(os.environ.get(name) for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"))
    if sys.platform != "linux" or user_named_one:
        return []
    pinned = re.search(r"(?m)^torch==(\S+)", f"{wanted['torch']}\n{(ROOT / 'constraints.txt').read_text()}")
    for build in torch_builds():
        try:
            with urlopen(f"{TORCH_WHEELS}/{build}/torch/", timeout=3) as page:
                there = page.read().decode()
        except OSError:
            continue
        if not pinned or f"torch-{pinned[1]}" in there:
            return ["--extra-index-url", f"{TORCH_WHEELS}/{build}"]
    return []


def requirements(extras: list[str]) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = project["optional-dependencies"]
    if unknown := set(extras) - set(known):
        sys.exit(f"set-up: no such extra: {', '.join(sorted(unknown))}; pyproject.toml has {', '.join(known)}")
    return project["dependencies"] + [line for extra in extras for line in known[extra]]


def install(wanted: Stamp, lock_fd: int) -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    if wanted["torch"] != "torch":
        constraints = re.sub(r"(?m)^torch==.*$", "", constraints)
    (VENV / "constraints.txt").write_text(constraints)
    # As variables, since -c would not reach the environments in which pip builds a source distribution; older pips read the first alone.
    # Relative to cwd, since pip splits them at spaces.
    env = {**os.environ, "PIP_CONSTRAINT": "constraints.txt", "PIP_BUILD_CONSTRAINT": "constraints.txt"}
    quiet = [] if sys.stderr.isatty() else ["-q"]

    def pip(*arguments: str) -> None:
        # pip holds the lock too: should this script be killed, the next set-up waits for the pip it left behind.
        command = [PYTHON, "-m", "pip", "install", *quiet, "--disable-pip-version-check", *arguments]
        subprocess.run(command, check=True, cwd=VENV, env=env, stdin=subprocess.DEVNULL, stdout=sys.stderr, pass_fds=(lock_fd,))

    pip(*extra_index(wanted), wanted["torch"], "hatchling", *requirements(wanted["extras"]))
    pip("--no-deps", "--no-build-isolation", "-e", str(ROOT))  # built by the hatchling that was just installed


def remake(reason: str, lock_fd: int) -> None:
    say(f"making .venv with Python {THIS_PYTHON} ({reason}); this takes a few minutes")
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    STAMP.write_text("")
    # The base interpreter, since the one that runs this may be the one in .venv that was just removed.
    subprocess.run([getattr(sys, "_base_executable", sys.executable), "-m", "venv", VENV], check=True, pass_fds=(lock_fd,))


def refresh(stamp: Stamp | None, wanted: Stamp, lock_fd: int) -> None:
    """Install into a usable .venv. It is not given up because pip refuses (no network, say), and never if it was made by hand."""
    if stamp is None:
        return install(wanted, lock_fd)
    STAMP.write_text("")
    try:
        install(wanted, lock_fd)
    except subprocess.CalledProcessError:
        STAMP.write_text(json.dumps(stamp))
        raise


def make(extras: list[str], lock_fd: int) -> None:
    requirements(extras)  # an unknown extra is refused before anything is touched
    stamp, version = read_stamp(), venv_python()  # read again under the lock: another set-up may just have done the work
    wanted = wanted_stamp(stamp, extras)
    if reason := why_remake(stamp, version):
        remake(reason, lock_fd)
        install(wanted, lock_fd)
    elif reason := why_refresh(stamp, wanted):
        say(f"updating .venv ({reason})")
        refresh(stamp, wanted, lock_fd)
    else:
        return
    STAMP.write_text(json.dumps({**wanted, "python": venv_python()}))
    say(".venv is ready")


def main(extras: list[str]) -> int:
    stamp = read_stamp()
    if stamp and not why_remake(stamp, venv_python()) and not why_refresh(stamp, wanted_stamp(stamp, extras)):
        return 0
    with open(ROOT / ".venv.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another set-up of this checkout")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            make(extras, lock.fileno())
        except subprocess.CalledProcessError as error:
            say(f"failed, see the message above; the command was: {shlex.join(map(str, error.cmd))}")
            return 1
        except KeyboardInterrupt:
            say("interrupted; call it again to finish")
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
