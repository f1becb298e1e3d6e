"""Completion: what a word can become, and that bash and zsh really offer it."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from picotrain import bench
from picotrain.config import completion
from picotrain.config.completion import BENCHMARKS, COMMANDS, SHELLS, complete, script
from picotrain.config.groups import GROUPS, choices

SOURCE = str(Path(completion.__file__).parents[2])


def test_the_first_word_is_a_command():
    assert complete([], "re") == ["resume", "report"]
    assert complete(["data"], "") == ["show", "prepare", "inspect", "verify", "download"]
    assert complete(["completion"], "") == list(SHELLS)
    assert complete(["bench"], "s") == ["step", "sampling", "startup"]


def test_the_commands_are_those_of_the_command_line():
    typer_main = pytest.importorskip("typer.main")
    from picotrain.cli import app

    group = typer_main.get_command(app)
    own = {name: tuple(getattr(command, "commands", ())) for name, command in group.commands.items() if not command.hidden}
    assert own == COMMANDS
    assert bench.NAMES == BENCHMARKS


def test_nothing_typed_offers_groups_and_sections():
    assert complete(["train"], "")[: len(GROUPS)] == [f"{group}=" for group in GROUPS]
    assert {"run.", "model.", "train.", "evaluation."} <= set(complete(["train"], ""))


def test_a_prefix_offers_groups_sections_and_keys_one_part_at_a_time():
    assert complete(["train"], "mod") == ["model=", "model."]
    assert complete(["train"], "evaluation.") == ["evaluation.bpb.", "evaluation.core."]
    assert complete(["train"], "train.s") == ["train.seq_len=", "train.sample_every=", "train.save_every=", "train.skip_loss_z="]
    assert complete(["train"], "train.frob") == []


def test_a_group_offers_its_choices_and_a_key_its_words():
    assert complete(["plan", "data=files"], "model=") == [f"model={choice}" for choice in choices("model")]
    assert complete(["train"], "model=d1") == ["model=d12", "model=d16"]
    assert complete(["train"], "experiment=") == ["experiment=cpu_speedrun", "experiment=speedrun", "experiment=cpu_d4", "experiment=null"]
    assert complete(["train"], "train.precision=b") == ["train.precision=bf16"]
    assert complete(["train"], "hardware.compile=") == ["hardware.compile=true", "hardware.compile=false", "hardware.compile=auto"]
    assert complete(["train"], "train.grad_clip=") == ["train.grad_clip=null"]
    assert complete(["train"], "logger.trackers=t") == ["logger.trackers=tensorboard"]


@pytest.mark.parametrize("option", [["--config-dir", "{}"], ["--config-dir={}"]])
def test_a_folder_of_ones_own_is_looked_into(option: list[str], tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").touch()
    assert complete(["train", *(part.format(tmp_path) for part in option)], "model=m") == ["model=mine"]


def test_where_a_file_is_wanted_the_shell_is_left_to_offer_files():
    assert (
        complete(["train", "--config"], "")
        == complete(["resume"], "")
        == complete(["train"], "data.path=")
        == complete(["train"], "--")
        == []
    )
    assert "train." in complete(["resume", "runs/a"], "")


def test_beside_a_saved_config_no_group_is_offered():
    assert complete(["train", "--config", "a.yaml"], "mod") == ["model."]
    assert complete(["train", "--config", "a.yaml"], "model=") == []


# In the shells --------------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A `picotrain` that only completes, and says what it was asked."""
    path = tmp_path / "picotrain"
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {SOURCE!r})\nfrom picotrain.config.completion import complete\n"
        f"open({str(tmp_path / 'asked')!r}, 'w').write(repr(sys.argv[1:]))\n"
        "assert sys.argv[1:3] == ['__complete', '--']\nprint('\\n'.join(complete(sys.argv[3:-1], sys.argv[-1])))\n"
    )
    path.chmod(0o755)
    return path


def bash_replies(program: Path, *words: str, breaks: str = " \t\n\"'><=;|&(:") -> list[str]:
    """COMPREPLY for words as bash cuts them, the cursor at the end of the last."""
    (program.parent / "script").write_text(script("bash"))
    code = """
        source "$1"; COMP_WORDBREAKS=$2; shift 2
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        _picotrain "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    command = ["bash", "--norc", "-euc", code, "bash", str(program.parent / "script"), breaks, str(program), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@needs_bash
@pytest.mark.parametrize(
    ("words", "replies"),
    [
        ([""], [f"{command} " for command in COMMANDS]),
        (["tr"], ["train "]),
        (["train", "mod"], ["model=", "model."]),
        (["train", "model", "="], [f"{choice} " for choice in choices("model")]),
        (["train", "model", "=", "d1"], ["d12 ", "d16 "]),
        (["train", "model", "=", "d4", "train.prec"], ["train.precision="]),
        (["train", "data.path", "=", "a", "=", "b", "train.precision", "=", "b"], ["bf16 "]),
    ],
)
def test_bash_offers_what_follows_the_equals_sign(words: list[str], replies: list[str], program: Path):
    assert bash_replies(program, *words) == replies


@needs_bash
def test_bash_offers_whole_words_where_the_equals_sign_does_not_cut(program: Path):
    assert bash_replies(program, "train", "model=d1", breaks=" \t\n") == ["model=d12 ", "model=d16 "]


@needs_bash
def test_bash_puts_cut_words_together_again(program: Path):
    bash_replies(program, "train", "--config-dir", "=", "my conf", "data.path", "=", "a", "=b", "run.name", "=")
    assert (program.parent / "asked").read_text() == repr(
        ["__complete", "--", "train", "--config-dir=my conf", "data.path=a=b", "run.name="],
    )


def typed(shell: list[str], setup: str, keys: str, program: Path) -> str:
    """What an interactive shell shows after `keys`, which end in tabs."""
    terminal, inside = pty.openpty()
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "TERM": "dumb", "HOME": str(program.parent)}
    running = subprocess.Popen(shell, stdin=inside, stdout=inside, stderr=inside, env=environment, start_new_session=True)
    try:
        os.write(terminal, f"{setup}; PS1='go''> '\n".encode())
        read_until(terminal, "go> ")  # the prompt: as typed it has quotes inside
        os.write(terminal, keys.encode())
        return read_until(terminal, None)
    finally:
        running.kill()
        running.wait()
        os.close(inside)
        os.close(terminal)


def read_until(terminal: int, mark: str | None) -> str:
    """Output up to a mark, or until nothing has come for two seconds."""
    text, end = "", time.monotonic() + 20
    while time.monotonic() < end and (mark is None or mark not in text):
        if select.select([terminal], [], [], 2.0)[0]:
            text += os.read(terminal, 4096).decode(errors="replace")
        elif mark is None:
            break
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x07", "", text)


@needs_bash
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS' bash 3.2 echoes through another readline")
def test_an_interactive_bash_completes(program: Path):
    (program.parent / "script").write_text(script("bash"))
    shown = typed(
        ["bash", "--norc", "--noprofile", "-i"], f"source {program.parent}/script", "picotrain tra\tmodel=d3\ttrain.prec\tb\t", program
    )
    assert "picotrain train model=d32 train.precision=bf16 " in shown.replace("\r", "")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_an_interactive_zsh_completes(program: Path):
    (program.parent / "script").write_text(script("zsh"))
    setup = f"autoload -U compinit; compinit -u -D; source {program.parent}/script"
    shown = typed(["zsh", "-f", "-i"], setup, "picotrain tra\tmodel=d3\ttrain.prec\tb\t", program)
    assert "bf16" in shown
    assert (program.parent / "asked").read_text() == repr(["__complete", "--", "train", "model=d32", "train.precision=b"])


def test_the_scripts_say_how_to_install_them():
    assert 'eval "$(picotrain completion bash)"' in script("bash") and 'eval "$(picotrain completion zsh)"' in script("zsh")
