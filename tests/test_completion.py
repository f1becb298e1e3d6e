"""Completion: what a word can become, and that bash, zsh and fish really offer it."""

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
from typing import Any

import pytest
import typer

from picotrain import bench
from picotrain.cli import app, completion
from picotrain.cli.completion import OPTION_VALUES, PATH_KEYS, complete, reply, split
from picotrain.cli.shells import SHELLS, script
from picotrain.config.groups import GROUPS, choices
from picotrain.config.keys import leaves

SOURCE = str(Path(completion.__file__).parents[2])


def test_the_first_word_is_a_command():
    assert complete([], "re") == ["resume", "report"]
    assert complete(["data"], "") == ["show", "prepare", "inspect", "verify", "download"]
    assert complete(["completion"], "") == list(SHELLS)
    assert complete(["bench"], "s") == ["step", "startup"] and complete(["bench"], "") == list(bench.NAMES)
    assert complete([], "__") == [] and complete([], "xyz") == []


def test_every_option_of_every_command_is_offered_and_what_takes_text_is_known():
    root: Any = typer.main.get_command(app)
    for name, command in root.commands.items():
        for words, one in [([name], command)] + [([name, sub], inner) for sub, inner in getattr(command, "commands", {}).items()]:
            if one.hidden:
                continue
            longs = {option for param in one.params for option in param.opts if option.startswith("--")}
            assert longs | {"--help"} == set(complete(words, "--"))
            for param in one.params:
                if (
                    param.opts[0].startswith("--")
                    and not getattr(param, "is_flag", False)
                    and re.search("<str>|<path>|TEXT|PATH", str(param.get_help_record(ctx(one))))
                ):
                    assert param.opts[0] in OPTION_VALUES or param.opts[0] == "--checkpoint"
    assert complete(["eval"], "--ch") == ["--checkpoint"] and complete([], "--v") == ["--version"]
    assert complete(["train", "--config", "x"], "--conf") == ["--config-dir"]


def ctx(command: Any) -> Any:
    return command.context_class(command)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run of two checkpoints, text and a tokenizer, where we are."""
    for step in (40, 1000):
        (tmp_path / f"runs/mine/checkpoints/step_{step:08d}").mkdir(parents=True)
    (tmp_path / "runs/mine/config.yaml").touch()
    (tmp_path / "runs/my run").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a b.txt").touch()
    (tmp_path / "tok.json").touch()
    (tmp_path / ".hidden").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_run_is_a_folder_and_nothing_in_it(home: Path):
    for command in ("resume", "eval", "sample", "report", "doctor"):
        assert complete([command], "ru")[-1:] == ["runs/"] and complete([command], "runs/mi") == ["runs/mine/"]
        assert complete([command], "runs/mine/") == [] and complete([command], "zz") == []
    assert complete(["resume"], "~/ru") == ["~/runs/"]
    assert complete(["compare", "runs/mine"], "runs/mine@") == ["runs/mine@best", "runs/mine@40", "runs/mine@1000"]
    assert complete(["eval", "runs/mine"], "") == [] and "train." in complete(["resume", "runs/a"], "")


def test_options_are_given_their_values(home: Path):
    assert complete(["eval", "runs/mine", "--checkpoint"], "") == ["last", "best", "40", "1000"]
    assert complete(["sample", "--checkpoint"], "b") == ["best"]
    assert complete(["eval", "runs/mine"], "--checkpoint=1") == ["--checkpoint=1000"]
    assert complete(["train", "--config"], "to") == ["tok.json"] and complete(["train"], "--config=to") == ["--config=tok.json"]
    assert complete(["train", "--config-dir"], "t") == ["texts/"]
    assert complete(["bench", "--device"], "c") == ["cpu", "cuda"]
    assert complete(["sample", "runs/mine", "--seed"], "") == []


def test_files_are_offered_where_a_path_is_wanted(home: Path):
    assert complete(["train"], "data.path=~/te") == ["data.path=~/texts/"]
    assert complete(["train"], "data.path=texts/") == ["data.path=texts/a b.txt"]
    assert complete(["train"], "tokenizer.path=") == ["tokenizer.path=runs/", "tokenizer.path=texts/", "tokenizer.path=tok.json"]
    assert complete(["train"], "tokenizer.path=.h") == ["tokenizer.path=.hidden"]
    assert complete(["data", "prepare", "texts/"], "tok") == ["tok.json"] and complete(["data", "verify"], "t") == ["texts/"]
    assert complete(["config", ">"], "to") == ["tok.json"]
    assert complete(["train"], "run.name=t") == [] and all(leaves()[key].is_text for key in PATH_KEYS)


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


def test_beside_a_saved_config_no_group_is_offered():
    assert complete(["train", "--config", "a.yaml"], "mod") == ["model."]
    assert complete(["train", "--config", "a.yaml"], "model=") == []


# In the shells --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words", "current"),
    [
        ("picotrain train model=d", ["picotrain", "train"], "model=d"),
        ("picotrain  ", ["picotrain"], ""),
        ("x; y && A=1 picotrain res", ["A=1", "picotrain"], "res"),
        (r"p my\ run a'b c'd", ["p", "my run"], "ab cd"),
        ('p "a \\" b', ["p"], 'a " b'),
        ("p 'it", ["p"], "it"),
        ("p '' x", ["p", ""], "x"),
    ],
)
def test_a_line_is_cut_into_words_as_a_shell_does(line: str, words: list[str], current: str):
    assert split(line)[:2] == (words, current)


@pytest.mark.parametrize(
    ("line", "replaced", "found"),
    [
        ("picotrain res", "res", ["resume "]),
        ("picotrain resume xx", "xx", []),
        ("picotrain resume ru", "ru", ["runs/"]),
        ("picotrain train mod", "mod", ["model=", "model."]),
        ("picotrain train model=", "", [f"{choice} " for choice in choices("model")]),
        ("picotrain train model=d1", "d1", ["d12 ", "d16 "]),
        ("picotrain train model=d1", "model=d1", ["model=d12 ", "model=d16 "]),  # where COMP_WORDBREAKS lacks the =
        ("picotrain train data.path=a=b train.precision=b", "b", ["bf16 "]),
        ("picotrain train data.path=~/te", "~/te", ["~/texts/"]),
        ("picotrain train data.path=texts/a", "texts/a", [r"texts/a\ b.txt "]),
        ("picotrain train data.path='texts/a", "texts/a", ["texts/a b.txt "]),
        ("picotrain sample 'runs/my r", "runs/my r", ["runs/my run/"]),
        (r"picotrain sample runs/my\ r", r"runs/my\ r", [r"runs/my\ run/"]),
        ("picotrain compare runs/mine@4", "4", ["40 "]),
        ("picotrain train archive.url=s3://x", "//x", []),
    ],
)
def test_bash_is_given_what_takes_the_place_of_its_last_word(line: str, replaced: str, found: list[str], home: Path):
    assert reply("bash", line, replaced) == found


@pytest.fixture
def program(home: Path) -> Path:
    """A `picotrain` that completes, faster than the real one, and otherwise writes down the words that it is started with."""
    path = home / "picotrain"
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {SOURCE!r})\nif sys.argv[1:2] == ['__complete']:\n"
        "    from picotrain.cli.completion import reply\n    assert sys.argv[2] == '--'\n"
        "    for word in reply(*sys.argv[3:]): print(word)\nelse:\n"
        f"    print(*sys.argv[1:], sep='|', file=open({str(home / 'ran')!r}, 'a'))\n"
    )
    path.chmod(0o755)
    return path


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed: completion in it is NOT tested")


def started_by(shell: list[str], setup: str, keys: list[str], program: Path) -> list[str]:
    """The words that commands typed into an interactive shell, with tabs, really are started with."""
    terminal, inside = pty.openpty()
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "TERM": "dumb", "HOME": str(program.parent)}
    running = subprocess.Popen(
        shell, stdin=inside, stdout=inside, stderr=inside, env=environment, start_new_session=True, cwd=program.parent
    )
    ran, shown = program.parent / "ran", ""
    try:
        os.write(terminal, f"{setup}; PS1='go''> '\n".encode())
        end = time.monotonic() + 60
        while "go> " not in shown and time.monotonic() < end:  # the prompt: as typed it has quotes inside
            shown += read(terminal)
        for number, line in enumerate(keys, start=1):
            os.write(terminal, f"{line}\n".encode())
            while (not ran.exists() or ran.read_text().count("\n") < number) and time.monotonic() < end:
                shown += read(terminal)
    finally:
        running.kill()
        running.wait()
        os.close(inside)
        os.close(terminal)
    assert ran.exists(), shown
    return ran.read_text().replace("~", "HOME").replace(str(program.parent), "HOME").splitlines()  # bash expands the ~, zsh does not


def read(terminal: int) -> str:
    return os.read(terminal, 4096).decode(errors="replace") if select.select([terminal], [], [], 0.1)[0] else ""


TYPED = {
    "picotrain tra\tmodel=d3\ttrain.prec\tb\t": "train|model=d32|train.precision=bf16",
    "picotrain resume xx\t": "resume|xx",  # nothing matches: what was typed stays
    "picotrain eval ru\tmi\t --che\t1": "eval|runs/mine/|--checkpoint|1",
    "true && picotrain train --config=to\tdata.path=~/te\ta\t": "train|--config=tok.json|data.path=HOME/texts/a b.txt",
}


@needs("bash")
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS' bash 3.2 echoes through another readline")
def test_an_interactive_bash_completes(program: Path):
    (program.parent / "script").write_text(script("bash"))
    shell = ["bash", "--norc", "--noprofile", "-i"]
    assert started_by(shell, f"source {program.parent}/script", list(TYPED), program) == list(TYPED.values())


@needs("zsh")
def test_an_interactive_zsh_completes(program: Path):
    (program.parent / "script").write_text(script("zsh"))
    setup = f"autoload -U compinit; compinit -u -D; source {program.parent}/script"
    assert started_by(["zsh", "-f", "-i"], setup, list(TYPED), program) == list(TYPED.values())


@needs("fish")
def test_fish_completes(program: Path):
    (program.parent / "script").write_text(script("fish"))
    asked = [
        "picotrain train model=d3",
        "picotrain resume xx",
        "picotrain resume runs/mi",
        "picotrain train data.path=te",
        "picotrain eval --ch",
    ]
    code = f"source {program.parent}/script; for line in $argv; complete -C $line; end"
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "HOME": str(program.parent)}
    done = subprocess.run(["fish", "--no-config", "-c", code, *asked], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.splitlines() == ["model=d32", "runs/mine/", "data.path=texts/", "--checkpoint"], done.stderr


@needs("bash")
def test_the_bash_script_is_old_enough_for_macos():
    """bash 3.2 has no compopt, mapfile, readarray, ${x,,}, declare -A, &>> and no negative substring."""
    assert not re.search(r"compopt|mapfile|readarray|,,|\^\^|declare -A|&>>|\|&", re.sub(r"#.*", "", script("bash")))
    assert subprocess.run(["bash", "-n", "-c", script("bash")], capture_output=True).returncode == 0


def test_the_scripts_say_how_to_install_them():
    for shell, line in {"bash": 'eval "$(picotrain completion bash)"', "zsh": 'eval "$(picotrain completion zsh)"'}.items():
        assert line in script(shell)
    assert "picotrain completion fish | source" in script("fish")
