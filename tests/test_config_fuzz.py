"""Properties of the config: whatever is typed either composes and survives saving, or is refused in words."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import example, given, settings
from hypothesis import strategies as st

from picotrain.config import dump, flatten, load, with_values
from picotrain.config.groups import GROUPS
from picotrain.config.keys import leaves
from picotrain.config.overrides import parse, parse_value
from picotrain.config.validate import validate
from picotrain.errors import ConfigError, Problem

BASE = validate(
    {
        "model": {"depth": 4, "head_dim": 64},
        "data": {"kind": "files", "name": "texts", "path": "texts"},
        "optimizer": {"matrix_lr": 0.01, "embed_lr": 0.2, "head_lr": 0.01},
        "schedule": {"kind": "constant"},
    }
)
TEXT_KEYS = [key for key, leaf in leaves().items() if leaf.is_text]
TYPED = st.one_of(
    st.text(max_size=20),
    st.text(alphabet="0123456789.eE+-_,[]{}()'\"#:~ nulltrefas$", max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["null", "true", "false", "auto", "-1", "1e9", "[a, b]"]),
)


NAMES = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1)


@given(st.text(min_size=1).filter(lambda text: text != "null" and "${" not in text), st.sampled_from(TEXT_KEYS))
@example("~/a b#c?=d: {e}, [f]", "run.name")
@example("\x85\u2028\ufeff\x00\r\n\t", "run.dir")
def test_text_is_taken_as_typed(text: str, key: str):
    assert parse([f"{key}={text}"]).read().values == {key: text}


@settings(deadline=None)
@given(st.lists(st.text(min_size=1), max_size=3), NAMES, st.floats(min_value=1e-300, max_value=1e6), st.integers(1, 10**15))
@example(["\x85\u2028\ufeff\x00\r\n\t", "1e3", "2024-01-01", "yes", "1:30", "0x1f", "=", "<<"], "~", 1e-16, 1)
def test_saving_and_reading_back_gives_an_equal_config(prompts: list[str], name: str, rate: float, tokens: int):
    values = {"sampling.prompts": prompts, "data.name": name, "optimizer.matrix_lr": rate, "train.target_tokens": tokens}
    if any("${" in text for text in (*prompts, name)):
        return  # refused when read: see the next test
    config = with_values(BASE, values)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump(config), encoding="utf-8")
        assert load(path) == config


@settings(deadline=None)
@given(st.sampled_from(list(leaves())), TYPED)
@example("sampling.prompts", "[" * 3000)
@example("train.seq_len", "9" * 5000)
@example("train.seq_len", "٣")
def test_a_value_is_valid_or_one_problem_at_its_key(key: str, typed: str):
    value = parse_value(leaves()[key], typed)
    if isinstance(value, Problem):
        assert value.path == key
        return
    try:
        config = with_values(BASE, {key: value})
    except ConfigError as error:
        contradicts = key in ("data.kind", "schedule.final_fraction", "schedule.warmdown_fraction", "launch.nnodes", "model.head_dim")
        assert contradicts or [problem.path for problem in error.problems] == [key]
    else:
        assert list(flatten(config)) == list(leaves(type(config)))


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(st.text(max_size=15), st.tuples(st.sampled_from([*leaves(), *GROUPS, "x", "hydra.run.dir"]), TYPED).map("=".join)),
        max_size=6,
    )
)
@example(["experiment=null"])
def test_parsing_a_command_line_never_fails_and_loses_no_word(words: list[str]):
    result = parse(words).read()
    kept = len(result.groups) + len(result.values)
    repeated = len(words) - len({word.partition("=")[0].lstrip("+~") for word in words})
    none = any(word.lstrip("+") == "experiment=null" for word in words)  # which is the default: nothing is to be kept of it
    assert kept <= len(words) <= kept + len(result.problems) + repeated + none
    assert all(problem.message for problem in result.problems)
