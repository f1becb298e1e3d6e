"""Shell completion of commands, config groups, their choices, dotted keys and the words a key may hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from picotrain.config.groups import GROUPS, choices
from picotrain.config.keys import leaves

SHELLS = ("bash", "zsh")
COMMANDS: dict[str, tuple[str, ...]] = {  # and their own commands; a test compares them with picotrain.cli
    "train": (),
    "resume": (),
    "plan": (),
    "config": (),
    "eval": (),
    "compare": (),
    "sample": (),
    "report": (),
    "doctor": (),
    "bench": (),
    "data": ("show", "prepare", "inspect", "verify", "download"),
    "tokenizer": ("train", "eval"),
    "completion": (),
}
BENCHMARKS = (
    "matmul",
    "step",
    "memory",
    "loader",
    "checkpoint",
    "sampling",
    "startup",
    "time_to_bpb",
    "corpus",
    "core",
    "peers",
    "variants",
)  # those of picotrain.bench; a test, too
_RUN_COMMANDS = ("resume", "eval", "sample", "report")  # their first word is a run directory


def complete(words: Sequence[str], current: str) -> list[str]:
    """What `current`, the word being typed, can become, whole words.

    words: those before it, without the program's name; the first is the command.
    A word that ends in `=` or `.` is to be continued. Nothing found: the shell offers files.
    """
    command = words[0] if words else ""
    if len(words) == 0 or (len(words) == 1 and COMMANDS.get(command)):
        return [name for name in COMMANDS.get(command, COMMANDS) if name.startswith(current)]
    if command == "completion":
        return [shell for shell in SHELLS if shell.startswith(current)]
    if command == "bench":
        return [name for name in BENCHMARKS if name.startswith(current)]
    if command == "compare":  # nothing but paths
        return []
    if current.startswith("-") or words[-1] in ("--config", "--config-dir") or (len(words) == 1 and command in _RUN_COMMANDS):
        return []
    groups = () if "--config" in words else GROUPS
    key, equals, _ = current.partition("=")
    if not equals:
        found = [f"{group}=" for group in groups] + _next_parts(current)
    elif key in groups:
        none = ["null"] if key == "experiment" else []
        found = [f"{key}={choice}" for choice in choices(key, _config_dir(words)) + none]
    else:
        leaf = leaves().get(key)
        found = [f"{key}={word}" for word in leaf.words] if leaf and not leaf.is_text else []  # a text may be a path
    return [word for word in dict.fromkeys(found) if word.startswith(current)]


def _next_parts(start: str) -> list[str]:
    """The keys that begin with `start`, up to their next dot."""
    parts = []
    for key in leaves():
        if key.startswith(start) and key != "schema_version":
            part, dot, _ = key[len(start) :].partition(".")
            parts.append(start + part + (dot or "="))
    return parts


def _config_dir(words: Sequence[str]) -> Path | None:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name == "--config-dir" and (value or following):
            return Path(value or following).expanduser()
    return None


def script(shell: Literal["bash", "zsh"]) -> str:
    """The lines that teach a shell to complete; they call `picotrain __complete -- WORDS...`, the last word unfinished."""
    return {"bash": _BASH, "zsh": _ZSH}[shell]


# bash 3.2 (macOS) has no compopt and no mapfile: a finished word gets its space here, and lines are read one by one.
_BASH = r"""# picotrain completion for bash: eval "$(picotrain completion bash)"
_picotrain() {
    local word current="" candidate start=""
    local -a before=("${COMP_WORDS[0]}" __complete --)
    local i
    for ((i = 1; i <= COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if ((i > 1)) && [[ $word == =* || $current == *= ]]; then
            current+=$word # bash has cut the word at its =
        else
            ((i > 1)) && before+=("$current")
            current=$word
        fi
    done
    # what bash replaces begins after the last =, where it cuts words
    [[ $COMP_WORDBREAKS == *=* && $current == *=* ]] && start=${current%=*}=
    COMPREPLY=()
    while IFS= read -r candidate; do
        [[ $candidate == *[=.] ]] || candidate+=" "
        COMPREPLY+=("${candidate#"$start"}")
    done < <("${before[@]}" "$current" 2>/dev/null)
}
complete -o default -o nospace -F _picotrain picotrain
"""

_ZSH = r"""#compdef picotrain
# picotrain completion for zsh: eval "$(picotrain completion zsh)", after compinit
_picotrain() {
    local -a found
    found=(${(f)"$("${(Q)words[1]}" __complete -- "${(@Q)words[2,CURRENT-1]}" "$PREFIX" 2>/dev/null)"})
    if ((! $#found)); then
        compset -P '*='
        _files
        return
    fi
    compadd -Q -S '' -- ${(M)found:#*[=.]}
    compadd -Q -- ${found:#*[=.]}
}
compdef _picotrain picotrain
"""
