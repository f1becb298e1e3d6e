"""What is wrong with a command line, said in our form: all of it at once, with what would be right; exit code 2."""

from __future__ import annotations

import importlib
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from picotrain.errors import Problem, UsageError
from picotrain.text import columns, fitted

_errors: Any = importlib.import_module(typer.BadParameter.__module__)  # click's, or those of the click inside of typer
_HELP = ("--help", "-h")
_WHOLE = 1_000  # characters of a command's line in the list of commands: it is wrapped, never shortened
_NUMBER = re.compile(r"-?\.?[0-9].*")


@contextmanager
def in_our_words() -> Generator[None]:
    """Around a command: what click finds wrong is raised as a UsageError of ours."""
    try:
        yield
    except _errors.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            raise SystemExit(error.exit_code) from None
        raise UsageError([_problem(error.ctx, getattr(error, "param", None), None, error)]) from None


class Helped:
    """A command or a group whose help fits into the terminal, with nothing cut off."""

    def get_help(self: Any, ctx: Any) -> str:
        room = columns()
        ctx.terminal_width = min(room, ctx.max_content_width or 80) - 2  # without it click takes 50 columns for the least
        return fitted(super().get_help(ctx), room)  # pyright: ignore[reportAttributeAccessIssue]

    def get_short_help_str(self: Any, limit: int = 0) -> str:
        return super().get_short_help_str(_WHOLE)  # pyright: ignore[reportAttributeAccessIssue]


class Command(Helped, TyperCommand):
    """A command that names everything that is wrong with its words at once."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", *_pieces(self, ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments by the names that the usage line gives them, without Python's word for what they become."""
        for title, kind in (("Arguments", "argument"), ("Options", "option")):
            records = [(param, param.get_help_record(ctx)) for param in self.get_params(ctx) if param.param_type_name == kind]
            if rows := [(_metavar(param, ctx) if kind == "argument" else row[0], row[1]) for param, row in records if row]:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.ignore_unknown_options and not set(_HELP) & set(args):
            self._check(ctx, args)
        return super().parse_args(ctx, args)

    def _check(self, ctx: Any, args: list[str]) -> None:
        """Raise UsageError for what is wrong with the words."""
        values, rest, problems = _parsed(self, ctx, args)
        for param in self.params:
            try:
                param.handle_parse_result(ctx, values, [])
            except _errors.UsageError as error:
                problems.append(_problem(ctx, param, values.get(param.name), error))
        problems += _urls_for_paths(self, ctx, values)
        problems += [Problem(_shown(word), "is one word too many", _ways(ctx)) for word in rest]
        if problems:
            raise UsageError([*problems, *_of_overrides(values)])


class App(typer.Typer):
    """A Typer of such groups and commands, with plain help: rich would cost --help a third of its time."""

    def __init__(self, **options: Any):
        super().__init__(cls=Group, rich_markup_mode=None, no_args_is_help=True, **options)

    def command(self, name: str | None = None, **options: Any) -> Any:
        merged: dict[str, Any] = {"cls": Command, **options}
        return super().command(name, **merged)


class Group(Helped, TyperGroup):
    """Commands by name; an unknown one is answered with the nearest."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not ctx.resilient_parsing and not set(_HELP) & set(args):
            _, rest, problems = _parsed(self, ctx, args)
            if rest and rest[0] not in self.commands:
                problems.append(self._unknown(ctx, rest[0]))
            if problems:
                raise UsageError(problems)
        return super().parse_args(ctx, args)

    def _unknown(self, ctx: Any, word: str) -> Problem:
        names = [name for name, command in self.commands.items() if not command.hidden]
        if "=" in word and not ctx.parent:
            return Problem(_shown(word), "comes without a command", f"picotrain train {_shown(word)}")
        near = get_close_matches(word.lower(), names, 1)
        meant = f"did you mean `{ctx.command_path} {near[0]}`?; all: " if near else "commands: "
        return Problem(_shown(word), "there is no such command", meant + ", ".join(names))


def _urls_for_paths(command: Any, ctx: Any, values: dict[str, Any]) -> list[Problem]:
    """A URL, or half of one, where a path is wanted: as a path it would name a folder below this one."""
    from picotrain.config.places import flaw

    problems = []
    for param in command.params:
        given = values.get(param.name)
        for text in [given] if isinstance(given, str) else given if isinstance(given, list | tuple) else []:
            if _takes_path(param) and isinstance(text, str) and (wrong := flaw(text, "local")):
                option = next((name for name in param.opts if name.startswith("--")), _metavar(param, ctx))
                fetched = f"`picotrain resume {_shown(text)}` fetches a run" if option == "RUN" and "://" in text else wrong[1]
                problems.append(Problem(option, wrong[0], fetched))
    return problems


def _takes_path(param: Any) -> bool:
    """By what typer keeps of a parameter: its annotation, or in older versions click's type."""
    return "pathlib" in str(getattr(param, "type_descriptor", "")) or getattr(getattr(param, "type", None), "name", "") == "path"


def _parsed(command: Any, ctx: Any, args: list[str]) -> tuple[dict[str, Any], list[str], list[Problem]]:
    """What each parameter was given, the words left over, and the options that cannot be, which are taken out."""
    left, problems = list(args), []
    while True:
        try:
            values, rest, _ = command.make_parser(ctx).parse_args(list(left))
            return values, rest, problems
        except _errors.NoSuchOption as error:
            problems.append(_take_out(command, ctx, left, error.option_name))
        except _errors.BadOptionUsage as error:
            at = next(i for i in range(len(left) - 1, -1, -1) if left[i].partition("=")[0] == error.option_name)
            needs = "takes no value" if "=" in left[at] else "needs a value"
            hint = "" if "=" in left[at] else f"{error.option_name} {_metavar(_option(command, error.option_name), ctx)}"
            problems.append(Problem(error.option_name, needs, hint))
            del left[at]


def _take_out(command: Any, ctx: Any, left: list[str], name: str) -> Problem:
    """Remove an unknown option, and the value that was meant for it, from the words; what would have been right."""
    at = next((i for i, word in enumerate(left) if word.partition("=")[0] == name), None)
    if at is None:  # one letter of several: -abc
        at = next(i for i, word in enumerate(left) if word.startswith("-") and name[1:] in word)
    name, equals, value = left.pop(at).partition("=")
    overridable = any(param.name == "overrides" for param in command.params) or isinstance(command, TyperGroup)
    own = _own(command, name, overridable)
    following = left[at] if at < len(left) else "-"
    if own:
        is_value = not getattr(_option(command, own), "is_flag", False) and following[:1] != "-"
    else:
        is_value = bool(_NUMBER.fullmatch(following)) or (overridable and following[:1] not in ("-", "") and "=" not in following)
    if not equals and is_value and following not in getattr(command, "commands", ()):
        value, equals = left.pop(at), " "
    given = value if equals else None
    if own:
        hint = f"did you mean {own}{'' if given is None else ' ' + _shown(given)}?"
    else:
        words = _words(name, given) if overridable else ""
        start = "picotrain train " if isinstance(command, TyperGroup) and "=" in words else ""
        hint = f"right would be {start}{_shown(words)}" if "=" in words else words
    listed = "`picotrain config` prints all keys" if overridable else f"`{ctx.command_path} --help` lists them"
    return Problem(_shown(name + equals + value), "there is no such option", hint or listed)


def _own(command: Any, name: str, overridable: bool) -> str:
    """The option of this command that was probably meant, "" where a key of the config is likelier."""
    from picotrain.config.elsewhere import exact, plain

    own = {plain(option): option for option in _options(command)}
    if plain(name) in own:
        return own[plain(name)]
    near = get_close_matches(plain(name), own, 1, cutoff=0.75)
    return own[near[0]] if near and not (overridable and exact(name, None)) else ""


def _words(name: str, value: str | None) -> str:
    """The words that set what an unknown option was meant to set."""
    from picotrain.config.elsewhere import NOTHING, exact, plain, resembling

    return NOTHING.get(plain(name)) or exact(name, value) or resembling(name, value) or ""


def _problem(ctx: Any, param: Any, value: Any, error: Any) -> Problem:
    """What click found wrong, in our words."""
    if param is None:
        return Problem("", error.format_message().rstrip("."), _ways(ctx) if ctx else "")
    option = next((name for name in param.opts if name.startswith("--")), None)
    if isinstance(error, _errors.MissingParameter):
        return Problem(option or _metavar(param, ctx), "is missing", _ways(ctx))
    given = value if isinstance(value, str) else next((one for one in value or () if isinstance(one, str)), "")
    return Problem(f"{option or _metavar(param, ctx)} {_shown(given)}".rstrip(), *_rule(param, given, error))


def _rule(param: Any, given: str, error: Any) -> tuple[str, str]:
    """Why a value cannot be, and what could."""
    kind = getattr(param, "type", param)
    least = getattr(kind, "min", None)
    number = isinstance(least, float) or "float" in str(getattr(kind, "name", "")) or "number" in error.message.lower()
    whole = "integer" in error.message or "integer" in str(getattr(kind, "name", "")) or isinstance(least, int)
    if not (number or whole):
        return error.message.rstrip("."), ""
    wanted = "a whole number" if whole else "a number"
    bounds = f" of at least {least}" if least is not None else ""
    try:
        (int if whole else float)(given)
    except ValueError:
        return f"is not {wanted}", f"{wanted}{bounds}" if bounds else ""
    return "is too small" if bounds else error.message.rstrip("."), f"{wanted}{bounds}"


def _ways(ctx: Any) -> str:
    """How the command is used."""
    needed = [
        f"{param.opts[0]} {_metavar(param, ctx)}" for param in ctx.command.params if param.required and param.param_type_name == "option"
    ]
    return f"{' '.join([ctx.command_path, *_pieces(ctx.command, ctx), *needed])}; `{ctx.command_path} --help` says more"


def _pieces(command: Any, ctx: Any) -> list[str]:
    """The arguments of a usage line: RUN [OVERRIDE]..."""
    pieces = []
    for param in command.params:
        if param.param_type_name == "argument":
            name = _metavar(param, ctx).removesuffix("...")
            pieces.append((name if param.required else f"[{name}]") + "..." * (param.nargs == -1))
    return pieces


def _options(command: Any) -> Iterator[str]:
    for param in command.params:
        if param.param_type_name == "option" and not getattr(param, "hidden", False):
            yield from (option for option in (*param.opts, *param.secondary_opts) if option.startswith("--"))


def _option(command: Any, name: str) -> Any:
    return next(param for param in command.params if name in param.opts)


def _metavar(param: Any, ctx: Any) -> str:
    return param.metavar or param.name.upper()


def _of_overrides(values: dict[str, Any]) -> list[Problem]:
    """What is wrong with the group choices and keys beside it."""
    from picotrain.config.overrides import parse

    folder = values.get("config_dir")
    return parse([word for word in values.get("overrides") or () if word], Path(folder) if folder else None).read().problems


def _shown(text: str) -> str:
    """As it was typed, without what would repaint a terminal and a URL's password, and no longer than a line."""
    from picotrain.text import printable

    text = re.sub(r"(?<=://)[^/@\s]*@", "...@", printable(text).replace("\n", " "))
    return text if len(text) <= 100 else text[:97] + "..."
