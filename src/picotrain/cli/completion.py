"""Shell completion: commands, their options, runs, files, config groups, their choices, keys and the words a key may hold."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from picotrain.cli.shells import SHELLS

PATH_KEYS = ("run.dir", "run.cache_dir", "data.path", "tokenizer.path", "archive.url", "evaluation.core.bundle")
_SPECIAL = re.compile(r"""([\s"'\\$`&|;<>()*?\[\]{}!#])""")  # to bash and zsh; a ~ stays what it is


class Line(NamedTuple):
    """words: those before the cursor's, the first is the program. current: the word being typed. quote: the one that is open."""

    words: list[str]
    current: str
    quote: str


def reply(shell: str, line: str, replaced: str) -> list[str]:
    """What the shell is to insert. line: up to the cursor, as it was typed. replaced: the end of it that bash will put it in place of;
    the other shells replace the whole word being typed."""
    typed = split(line)
    start = 0
    if shell == "bash":  # which cuts words at = and : as well, and takes an open quote off, but not what else is quoted
        start = len(typed.current) - len(replaced if typed.quote else split(replaced).current)
    found = [word[start:] for word in complete(typed.words[1:], typed.current)]
    if shell in ("bash", "zsh") and not typed.quote:
        found = [_SPECIAL.sub(r"\\\1", word) for word in found]
    return [word if word.endswith(("=", ".", "/")) else word + " " for word in found] if shell == "bash" else found


def split(line: str) -> Line:
    """A line as shells cut it into words, whatever is still open at its end. What is before the last pipe or semicolon does not count."""
    words, current, begun, quote = [], "", False, ""
    letters = iter(line)
    for letter in letters:
        if quote:
            if letter == quote:
                quote = ""
            elif letter == "\\" and quote == '"':
                after = next(letters, "")
                current += after if after in '"\\$`' else letter + after
            else:
                current += letter
        elif letter in "\"'":
            quote, begun = letter, True
        elif letter == "\\":
            current, begun = current + next(letters, ""), True
        elif letter in " \t\n":
            words += [current] if begun else []
            current, begun = "", False
        elif letter in ";|&":
            words, current, begun = [], "", False
        else:
            current, begun = current + letter, True
    return Line(words, current, quote)


def complete(words: Sequence[str], current: str) -> list[str]:
    """What `current`, the word being typed, can become, whole words.

    words: those before it, without the program's name; the first is the command. A word that ends in `=`, `.` or `/` is to be continued.
    """
    if words and words[-1] in (">", ">>", "<", "2>", "&>"):
        return files(current)
    command, rest = _command(words)
    if inner := getattr(command, "commands", None):
        names = [name for name, one in inner.items() if not one.hidden]
        return _starting(current, names if not current.startswith("-") else _options(command)) if not rest else []
    own = {option: param for param in command.params if param.param_type_name == "option" for option in param.opts}
    name, equals, value = current.partition("=")
    if equals and name in own:
        return [f"{name}={found}" for found in _values(name, value, rest, own)]
    if rest and rest[-1] in own and _takes_value(own[rest[-1]]):
        return _values(rest[-1], current, rest[:-1], own)
    if current.startswith("-"):
        return _starting(current, [option for option in _options(command) if option not in rest])
    return _arguments(command, _positional(rest, own), rest, current)


def _command(words: Sequence[str]) -> tuple[Any, Sequence[str]]:
    """The command that the first words name, and the words after it."""
    import typer

    from picotrain.cli import app

    command: Any = typer.main.get_command(app)
    while words and (found := getattr(command, "commands", {}).get(words[0])):
        command, words = found, words[1:]
    return command, words


def _options(command: Any) -> list[str]:
    found = [option for param in command.params if param.param_type_name == "option" for option in param.opts]
    return [option for option in [*found, "--help"] if option.startswith("--")]


def _takes_value(param: Any) -> bool:
    return not getattr(param, "is_flag", False)


def _positional(words: Sequence[str], own: dict[str, Any]) -> list[str]:
    """The words that are neither options nor the values of options."""
    found, value = [], False
    for word in words:
        if not value and not word.startswith("-"):
            found.append(word)
        value = not value and word in own and _takes_value(own[word])
    return found


def _arguments(command: Any, given: Sequence[str], rest: Sequence[str], current: str) -> list[str]:
    """What the next argument of a command can be."""
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    param = arguments[min(len(given), len(arguments) - 1)] if arguments else None
    if param is None or (len(given) >= len(arguments) and param.nargs == 1):
        return []
    match param.name:
        case "run":
            return runs(current)
        case "overrides":
            return overrides(rest, current) + (runs(current) if command.name == "doctor" and not given else [])
        case "models":
            return _models(current)
        case "names":
            from picotrain.bench import NAMES

            return _starting(current, NAMES)
        case "shell":
            return _starting(current, SHELLS)
        case "inputs":
            return files(current)
        case "corpus":
            return _starting(current, ("climbmix", "fineweb_edu")) if command.name == "download" else folders(current)
    return []


# Values ---------------------------------------------------------------------------------------------------


def files(start: str) -> list[str]:
    """Files and folders whose paths begin so, as they are typed: ~ stays ~. Folders end in /."""
    head, slash, tail = start.rpartition("/")
    try:
        with os.scandir(os.path.expanduser(head + slash) or ".") as entries:
            found = [(entry.name, entry.is_dir()) for entry in entries if entry.name.startswith(tail)]
    except OSError:
        return ["~/"] if start == "~" else []
    shown = [(name, folder) for name, folder in found if tail.startswith(".") or not name.startswith(".")]
    return [f"{head}{slash}{name}{'/' if folder else ''}" for name, folder in sorted(shown) if name.isprintable()]


def folders(start: str) -> list[str]:
    """Those of them that are folders."""
    return [path for path in files(start) if path.endswith("/")]


def runs(start: str) -> list[str]:
    """Folders that are or may hold runs; nothing inside of a run."""
    inside = Path(os.path.expanduser(start.rpartition("/")[0] or "."), "config.yaml").is_file() and "/" in start
    return [] if inside else folders(start)


def checkpoints(run: str) -> list[str]:
    """last, best, and the steps of a run's checkpoints."""
    steps = sorted(int(path.name[5:]) for path in Path(os.path.expanduser(run)).glob("checkpoints/step_*") if path.name[5:].isdecimal())
    return ["last", "best", *map(str, steps)]


def _models(start: str) -> list[str]:
    run, at, which = start.rpartition("@")
    if at and Path(os.path.expanduser(run)).is_dir():
        return [f"{run}@{name}" for name in _starting(which, checkpoints(run)[1:])]
    return folders(start)


OPTION_VALUES: dict[str, Callable[[str], list[str]]] = {  # of the options that take text
    "--config": files,
    "--config-dir": folders,
    "--bundle": folders,
    "--hf": folders,
    "--html": files,
    "--out": files,
    "--path": files,
    "--tokenizer": files,
    "--baseline-table": lambda start: [],
    "--device": lambda start: _starting(start, ("auto", "cpu", "cuda")),
}


def _values(option: str, start: str, rest: Sequence[str], own: dict[str, Any]) -> list[str]:
    if option == "--checkpoint":
        given = _positional(rest, own)
        return _starting(start, checkpoints(given[0]) if given else ["last", "best"])
    return OPTION_VALUES[option](start) if option in OPTION_VALUES else []


def overrides(words: Sequence[str], current: str) -> list[str]:
    """Group choices, keys one part at a time, the words of a key, and files where it is a path."""
    from picotrain.config.groups import GROUPS, choices
    from picotrain.config.keys import leaves

    groups = () if any(word.partition("=")[0] == "--config" for word in words) else GROUPS
    key, equals, value = current.partition("=")
    if not equals:
        parts = [key[len(current) :].partition(".") for key in leaves() if key.startswith(current) and key != "schema_version"]
        return _starting(current, [f"{group}=" for group in groups] + [current + part + (dot or "=") for part, dot, _ in parts])
    if key in groups:
        none = ["null"] if key == "experiment" else []
        return [f"{key}={choice}" for choice in _starting(value, choices(key, _config_dir(words)) + none)]
    if key in PATH_KEYS:
        return [f"{key}={path}" for path in files(value)]
    leaf = leaves().get(key)
    return [f"{key}={word}" for word in _starting(value, leaf.words)] if leaf and not leaf.is_text else []


def _starting(start: str, words: Sequence[str]) -> list[str]:
    return [word for word in dict.fromkeys(words) if word.startswith(start)]


def _config_dir(words: Sequence[str]) -> Path | None:
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, _, value = word.partition("=")
        if name == "--config-dir" and (value or following):
            return Path(os.path.expanduser(value or following))
    return None
