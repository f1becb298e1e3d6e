"""An evaluation bundle as DCLM and nanochat publish it: a folder of tasks, their examples and random baselines.

    core.yaml            icl_tasks: label, dataset_uri, num_fewshot, icl_task_type, continuation_delimiter
    eval_meta_data.csv   "Random baseline" of each "Eval Task", in percent
    eval_data/           one JSON object a line; dataset_uri is relative to it

Nothing in it is trusted: only plain values are read, only from regular files inside the folder. What is wrong with one
task is a `problem` of that task alone; only a bundle without a readable list of tasks or baselines raises.
"""

from __future__ import annotations

import csv
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError, model_validator

from picotrain.config.saved import parse_yaml, yaml_reason
from picotrain.disk import read_plain
from picotrain.errors import DataError
from picotrain.places import expanded

MAX_TASKS_BYTES = 1 << 20  # of core.yaml, and of a table of baselines
MAX_EXAMPLES_BYTES = 1 << 30
MAX_SHOTS = 1000

# DCLM changed three baselines of CORE tasks after CORE was published; figures made with the two tables do not compare.
KNOWN_TABLES = {
    "84e279cdc0d836c9ea3a6e55a99102f8ee18f72809fe7aa6ac5a1fe630aa492f": "v1",  # nanochat's; DCLM's eval_meta_data_v1.csv
    "3d8191d45cc64a809c4514a3a03e94c50599e843cf87cadaa0e687a042117018": "dclm_v2",  # mlfoundations/dclm @ 361714bdd60b
}
DEFAULT_TABLE = "eval_meta_data.csv"

Kind = Literal["multiple_choice", "schema", "language_modeling"]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # upstream's files have further keys


class _Entry(_Plain):
    """A task as core.yaml has it."""

    label: Annotated[StrictStr, Field(min_length=1, max_length=200)]
    dataset_uri: Annotated[StrictStr, Field(min_length=1)]
    num_fewshot: Annotated[list[Annotated[StrictInt, Field(ge=0, le=MAX_SHOTS)]], Field(min_length=1, max_length=1)]
    icl_task_type: StrictStr
    continuation_delimiter: StrictStr = " "


class _Choosing(_Plain):
    gold: Annotated[StrictInt, Field(ge=0)]

    @model_validator(mode="after")
    def _gold_is_there(self) -> _Choosing:
        if self.gold >= len(self.options):
            raise ValueError(f"gold={self.gold}, but there are {len(self.options)} options")
        return self

    @property
    def options(self) -> list[str]:
        raise NotImplementedError


class MultipleChoice(_Choosing):
    """One context, several continuations."""

    query: StrictStr
    choices: Annotated[list[StrictStr], Field(min_length=2)]

    @property
    def options(self) -> list[str]:
        return self.choices


class Schema(_Choosing):
    """Several contexts, one continuation."""

    context_options: Annotated[list[StrictStr], Field(min_length=2)]
    continuation: StrictStr

    @property
    def options(self) -> list[str]:
        return self.context_options


class LanguageModeling(_Plain):
    """A context and the continuation that a model has to find."""

    context: StrictStr
    continuation: Annotated[StrictStr, Field(min_length=1)]


Example = MultipleChoice | Schema | LanguageModeling
KINDS: dict[str, type[Example]] = {
    "multiple_choice": MultipleChoice,
    "schema": Schema,
    "language_modeling": LanguageModeling,
}
assert tuple(KINDS) == get_args(Kind)


@dataclass(frozen=True)
class Task:
    """A task of a bundle. baseline: accuracy of guessing, 0 to 1. problem: why it cannot be evaluated, "" where it can."""

    label: str
    path: Path
    kind: str
    num_fewshot: int
    delimiter: str
    baseline: float
    problem: str = ""


@dataclass(frozen=True)
class Bundle:
    """The tasks of the bundle in folder `path`, in the order of core.yaml. baseline_table: which random baselines count, by
    file name and what is known of its content: "eval_meta_data.csv (v1)"."""

    path: Path
    baseline_table: str
    tasks: tuple[Task, ...]


def read_bundle(path: Path, baseline_table: str = DEFAULT_TABLE) -> Bundle:
    """The bundle in a folder; examples are read later, by `read_examples`.

    baseline_table: the file in it with the random baselines. Raises DataError where core.yaml or that table are missing or
    unreadable.
    """
    path = expanded(path)
    if not path.is_dir():
        raise DataError(f"there is no folder {path}; a bundle is a folder with core.yaml, {DEFAULT_TABLE} and eval_data")
    baselines, table, tree, wrong = {}, "", [], []
    try:
        baselines, table = _read_table(path, baseline_table)
    except DataError as error:
        wrong.append(str(error))
    try:
        tree = _read_tasks(path / "core.yaml")
    except DataError as error:
        wrong.append(str(error))
    if wrong:
        raise DataError("; ".join(wrong))
    tasks: list[Task] = []
    for number, entry in enumerate(tree, start=1):
        tasks.append(_task(path, entry, number, baselines, {task.label for task in tasks}))
    return Bundle(path, table, tuple(tasks))


def read_examples(task: Task) -> list[Example]:
    """All examples of a task, in the order of its file. Raises DataError that names the file and the line."""
    if task.problem:
        raise DataError(task.problem)
    try:
        lines = read_plain(task.path, MAX_EXAMPLES_BYTES).split(b"\n")
    except OSError as error:
        raise DataError(f"{task.path} cannot be read: {error.strerror}") from None
    model, examples = KINDS[task.kind], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                examples.append(model.model_validate_json(line))
            except ValidationError as error:
                raise DataError(f"{task.path}, line {number}: {_reason(error)}; it should be an example of {task.kind}") from None
    if not examples:
        raise DataError(f"{task.path} holds no examples")
    return examples


def _read_tasks(path: Path) -> list[Any]:
    try:
        tree = parse_yaml(_read_text(path))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: {yaml_reason(error)}") from None
    except ValueError as error:
        raise DataError(f"{path} holds a value that YAML cannot read ({error})") from None
    tasks = tree.get("icl_tasks") if isinstance(tree, dict) else None
    if not isinstance(tasks, list) or not tasks:
        raise DataError(f"{path} has no list icl_tasks of at least one task")
    return tasks


def _task(root: Path, entry: Any, number: int, baselines: dict[str, float | str], taken: set[str]) -> Task:
    """An entry of core.yaml, whatever it is."""
    where = f"{root / 'core.yaml'}, task {number}"
    try:
        found = _Entry.model_validate(entry)
    except ValidationError as error:
        label = entry.get("label") if isinstance(entry, dict) else None
        label = label if isinstance(label, str) and label and label not in taken else f"task {number}"
        return Task(label, root, "", 0, "", 0.0, f"{where}: {_reason(error)}")
    data, baseline = root / "eval_data", baselines.get(found.label)
    path, problem = data / found.dataset_uri, ""
    if found.label in taken:
        problem = f"{where}: the label {found.label!r} is there twice"
    elif found.icl_task_type not in KINDS:
        problem = f"{where}, {found.label}: unknown icl_task_type {found.icl_task_type!r}; known are {', '.join(KINDS)}"
    elif "\0" in found.dataset_uri or not path.resolve().is_relative_to(data.resolve()):
        problem = f"{where}, {found.label}: dataset_uri {found.dataset_uri!r} leaves the folder eval_data"
    elif not isinstance(baseline, float):
        problem = f"{where}, {found.label}: {baseline or 'the table of random baselines has no row for it'}"
    label = f"{found.label} (task {number})" if found.label in taken else found.label
    value = baseline if isinstance(baseline, float) else 0.0
    return Task(label, path, found.icl_task_type, found.num_fewshot[0], found.continuation_delimiter, value, problem)


def _read_table(root: Path, name: str) -> tuple[dict[str, float | str], str]:
    """Baselines of all tasks, 0 to 1 (or what is wrong with one), and what the table is called in results."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise DataError(f"the table of random baselines, {name!r}, must be the name of a file in {root}")
    path = root / name
    text = _read_text(path)
    digest = hashlib.sha256(text.encode()).hexdigest()
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    baselines: dict[str, float | str] = {}
    try:
        if not {"Eval Task", "Random baseline"} <= set(reader.fieldnames or ()):
            raise DataError(f"{path}, line 1: there is no column 'Eval Task' or no 'Random baseline'")
        for row in reader:
            baselines[row["Eval Task"]] = _baseline(row["Random baseline"], f"{path}, line {reader.line_num}")
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None
    return baselines, f"{name} ({KNOWN_TABLES.get(digest, f'sha256 {digest[:16]}')})"


def _baseline(percent: str | None, where: str) -> float | str:
    try:
        value = float(percent or "")
    except ValueError:
        value = math.nan
    return value / 100 if 0 <= value < 100 else f"{where}: the random baseline {percent!r} is no number of percent from 0 to below 100"


def _read_text(path: Path) -> str:
    try:
        return read_plain(path, MAX_TASKS_BYTES).decode("utf-8")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; a bundle is a folder with core.yaml, {DEFAULT_TABLE} and eval_data"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start:,})") from None


def _reason(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]
