"""report.html: one file without a network or a script, true about the run, and harmless whatever text is in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_report import unpadded

from picotrain.report import read_run, summarise, write_report
from picotrain.report.charts import Charts, draw_charts
from picotrain.report.curves import MAX_POINTS, course_panels, curve, learned_panels, progress
from picotrain.report.html import fill, render_page

Line = dict[str, Any]
VOID = ("meta", "input", "br", "hr", "img", "link", "base")
HOSTILE = "</pre></title></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{name}"
TASKS = {
    "hellaswag": {"n": 500, "accuracy": 0.4, "centered": 0.2, "stderr": 0.02},
    "boolq": {"n": 500, "accuracy": 0.5, "centered": -0.3158, "stderr": 0.02},
    "copa": {"n": 0, "accuracy": None, "centered": None, "stderr": None},
}


class Page(HTMLParser):
    """The elements, attributes and text of a page; every element must be closed in its turn."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.source = source
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def values(self, attribute: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(attribute)) is not None]

    def charts(self) -> list[str]:
        return [label.split(" (")[0] for tag, attrs in self.tags if tag == "svg" and (label := attrs["aria-label"])]


def train(step: int, **changed: Any) -> Line:
    line = {
        "step": step, "kind": "train", "loss": 5.0 - 0.01 * step, "smooth_loss": 5.1 - 0.01 * step, "lr": 0.1, "grad_norm": 1.0,
        "tokens": 100, "tok_per_sec": 1000.0, "mfu": None, "dt_ms": 100.0, "data_wait_ms": 1.0, "total_training_time_s": 0.1 * (step + 1),
    }  # fmt: skip
    return line | changed


def val(step: int, bpb: float) -> Line:
    return {"step": step, "kind": "val", "val_bpb": bpb, "val_loss": 2 * bpb, "tokens": 1000}


def core(step: int, metric: float | None, tasks: dict[str, Any]) -> Line:
    return {"step": step, "kind": "core", "core_metric": metric, "tasks": tasks}


def event(step: int, name: str, message: str = "") -> Line:
    return {"step": step, "kind": "event", "name": name, "message": message, "time": "2026-01-01T00:00:00+00:00"}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """A run directory of 20 planned steps with these lines in its metrics.jsonl."""

    def build(*lines: Line) -> Path:
        root = tmp_path / "run"
        root.mkdir()
        (root / "config.yaml").write_text("run: {name: tiny, seed: 7}\n")
        (root / "plan.json").write_text(json.dumps({"name": "tiny", "num_steps": 20, "total_batch_size": 100}))
        (root / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.13"}}))
        (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return root

    return build


def whole_run() -> list[Line]:
    samples = {"step": 20, "kind": "sample", "samples": [{"prompt": "P", "text": " of a sample"}]}
    return [val(0, 3.0), *(train(s) for s in range(20)), val(20, 1.5), samples, event(20, "finished")]


def written(root: Path) -> Page:
    write_report(root)
    return Page((root / "report.html").read_text(encoding="utf-8"))


def assert_harmless(page: Page) -> None:
    """Nothing is loaded, nothing runs, and the policy says so to the browser."""
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form", "img", "foreignobject"} == set()
    assert [attrs["content"] for tag, attrs in page.tags if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"] == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    ]
    assert [name for _, attrs in page.tags for name in attrs if name.startswith("on") or name in ("src", "srcset", "action")] == []
    assert all(link.startswith("#") for link in page.values("href") + page.values("xlink:href"))
    style = re.search(r"<style>(.*?)</style>", page.source, re.DOTALL)
    assert style and "@import" not in style[1] and "url(" not in style[1]
    assert all("url(" not in text for text in page.values("style"))


def test_a_finished_run_has_every_section_and_every_curve(run: Callable[..., Path]) -> None:
    root = run(*whole_run())
    folder = root / "checkpoints/step_00000020"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    (folder / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": {"bytes": 1000, "xxh3_64": "0"}}}))
    page = written(root)
    assert_harmless(page)
    headings = re.findall("<h2>(.*?)</h2>", page.source)
    assert headings == [
        "Did it learn?", "Course of the training", "CORE", "Samples", "Checkpoints", "Throughput", "Model and batch", "Config",
        "Environment", "Attempts and events",
    ]  # fmt: skip
    expected = ["Loss", "Validation BPB", "Learning rate", "Gradient norm", "Throughput", "Wait for data"]
    assert page.charts() == expected
    for words in ("Yes. On unseen text", "[P] of a sample", "run: {name: tiny, seed: 7}", "packages.torch", "MFU not known"):
        assert words in page.text
    assert "checkpoints/step_00000020" in page.text and "whole: manifest and sizes agree" in page.text and "latest" in page.text
    assert "step 20: 1.5000 bits per byte" in page.text  # where the pointer rests on a point
    markdown = (root / "report.md").read_text()
    assert "](loss.png)" in markdown and "](course.png)" in markdown and (root / "course.png").is_file()


def test_no_two_elements_have_one_id_and_every_reference_is_there(run: Callable[..., Path]) -> None:
    page = written(run(*whole_run()))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    used = page.values("for")
    assert used and set(used) <= set(ids)


def test_the_curves_follow_the_colours_of_the_page(run: Callable[..., Path]) -> None:
    page = written(run(*whole_run()))
    drawings = "".join(re.findall("<svg.*?</svg>", page.source, re.DOTALL))
    assert "var(--train)" in drawings and "var(--val)" in drawings
    assert re.findall("#[0-9a-fA-F]{6}", drawings) == []
    assert "prefers-color-scheme: dark" in page.source


def test_steps_tokens_and_time_can_be_chosen_where_they_are_known(run: Callable[..., Path]) -> None:
    root = run(*whole_run())
    page = written(root)
    assert [value for value in page.values("id") if value.startswith("over-")] == ["over-steps", "over-tokens", "over-time"]
    scale = re.search('<g class="scale-tokens">(.*?)</g>', page.source)
    assert scale and re.findall(r">(\w+)</text>", scale[1]) == ["0", "500", "1000", "1500", "2000", "tokens"]  # 20 steps of 100
    assert "seconds of training" in page.text
    (root / "plan.json").write_text("{}")
    (root / "metrics.jsonl").write_text("".join(json.dumps(train(s, total_training_time_s=None, tokens=None)) + "\n" for s in range(5)))
    page = written(root)
    assert [value for value in page.values("id") if value.startswith("over-")] == []
    assert "Loss" in page.charts() and 'class="by-time"' not in page.source


def test_time_starts_at_zero_and_is_that_of_the_steps_done(run: Callable[..., Path]) -> None:
    done = progress(read_run(run(*(train(s) for s in range(10)))))
    assert done.seconds_at(np.array([0.0, 1.0, 4.5, 10.0])) == pytest.approx([0.0, 0.1, 0.45, 1.0])


@pytest.mark.parametrize("where", ["name", "config", "sample", "event", "override", "environment", "task", "source", "note", "data"])
def test_hostile_text_stays_text(run: Callable[..., Path], where: str) -> None:
    sample = {"step": 1, "kind": "sample", "samples": [{"prompt": HOSTILE, "text": HOSTILE + "\x1b[31m"}]}
    lines: dict[str, Line] = {"sample": sample, "event": event(1, HOSTILE, HOSTILE), "task": core(1, 0.1, {HOSTILE: TASKS["boolq"]})}
    root = run(train(0), train(1), *([lines[where]] if where in lines else []))
    plan = {"name": HOSTILE if where == "name" else "tiny", "notes": [HOSTILE] if where == "note" else []}
    (root / "plan.json").write_text(json.dumps(plan))
    if where == "config":
        (root / "config.yaml").write_text(json.dumps({"run": {"seed": HOSTILE}, "optimizer": {HOSTILE: HOSTILE}}))
    elif where == "override":
        (root / "overrides.txt").write_text(HOSTILE)
        for attempt in ("0001", "0002"):
            (root / "attempts" / attempt).mkdir(parents=True)
            (root / "attempts" / attempt / "overrides.txt").write_text(HOSTILE)
    elif where == "environment":
        (root / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    elif where == "data":
        (root / "data.json").write_text(json.dumps({"corpus": {"name": HOSTILE, "root": HOSTILE}, "tokenizer": {"encoder": HOSTILE}}))
    elif where == "source":
        (root / "eval/step_00000001").mkdir(parents=True)
        results = {"bpb": {"val": 1.0, "train": 1.0, "by_source": {HOSTILE: 1.0, "x": HOSTILE}}}
        (root / "eval/step_00000001/results.json").write_text(json.dumps(results))
    page = Page(render_page(read_run(root), summarise(read_run(root)), Charts()))
    assert_harmless(page)
    assert HOSTILE[: HOSTILE.index('"')] in page.text or json.dumps(HOSTILE)[1:-1] in page.text
    assert "\x1b" not in page.source


def test_markup_in_a_page_of_markdown_stays_text_even_if_it_was_not_escaped() -> None:
    text = "# t\n\n<script>alert(1)</script>\n\n[a](javascript:1) <b onclick=x> ![p](http://x/y.png)\n\n<details><summary>ok</summary>\n\n</details>\n"
    page = Page(fill(text, "t", "s", "finished", [], "f"))
    assert_harmless(page)
    assert "<script>alert(1)</script>" in page.text and [tag for tag, _ in page.tags].count("details") == 1


def test_without_a_line_of_core_it_is_not_evaluated_and_never_zero(run: Callable[..., Path]) -> None:
    root = run(*whole_run())
    page = written(root)
    assert "CORE: not evaluated." in page.text and "CORE not evaluated" in page.text
    assert "num bar" not in page.source and not (root / "core.png").exists()
    assert "CORE: not evaluated." in (root / "report.md").read_text()


def test_core_is_shown_by_task_and_over_steps(run: Callable[..., Path]) -> None:
    root = run(*whole_run(), core(10, 0.05, TASKS), core(20, 0.12345, TASKS))
    page = written(root)
    assert "CORE: 0.1235, at step 20; 2 of 3 tasks were measured." in page.text
    assert page.charts().count("CORE") == 1
    bars = re.findall(r'style="--from:([\d.]+)%;--to:([\d.]+)%;--c:var\(--(\w+)\)"', page.source)
    # On a scale from -0.3158 to 1; none for the task without a figure.
    assert bars == [("24.0", "39.2", "train"), ("0.0", "24.0", "val")]
    markdown = unpadded((root / "report.md").read_text())
    assert "| boolq | -0.3158 | 0.5000 | 0.0200 | 500 |" in markdown and "](core.png)" in markdown
    assert "| copa | | | | 0 |" in markdown


def test_core_measured_by_eval_counts_and_an_incomplete_one_has_no_mean(run: Callable[..., Path]) -> None:
    root = run(*whole_run())
    (root / "eval/step_00000020").mkdir(parents=True)
    results = {"step": 20, "bpb": {"val": 1.4, "train": 1.3}, "val_loss": 2.8, "core": {"core_metric": 0.2, "tasks": TASKS}}
    (root / "eval/step_00000020/results.json").write_text(json.dumps(results))
    page = written(root)
    assert "CORE: 0.2000, at step 20" in page.text and "Measured by picotrain eval:" in page.text
    results["core"] = {"core_metric": None, "tasks": TASKS}
    (root / "eval/step_00000020/results.json").write_text(json.dumps(results))
    assert "CORE: not known, as the evaluation is not complete" in written(root).text


@pytest.mark.parametrize(
    ("lines", "charts", "words"),
    [
        ([], [], "Not known. Validation was never measured"),
        ([train(0), train(1)], ["Loss", "Learning rate", "Gradient norm", "Throughput", "Wait for data"], "interrupted"),
        ([val(0, 3.0)], ["Loss", "Validation BPB"], "Validation was measured once"),
        ([train(0), train(1, loss=None, smooth_loss=None, grad_norm=None), event(1, "diverged")], [], "This run diverged"),
        ([train(s, mfu=0.4) for s in range(3)], ["MFU"], "MFU 40.0 %"),
        ([train(0, loss=None, smooth_loss=None, lr=None, grad_norm=None, tok_per_sec=None, data_wait_ms=None)], [], "interrupted"),
    ],
)
def test_a_run_of_which_little_is_known_has_no_empty_chart(
    run: Callable[..., Path], lines: list[Line], charts: list[str], words: str
) -> None:
    page = written(run(*lines))
    assert_harmless(page)
    assert set(charts) <= set(page.charts()) and (bool(page.charts()) or not charts)
    assert ("MFU" in page.charts()) == ("MFU" in charts)
    assert words in page.text
    if not page.charts():
        assert "<figure" not in page.source and "Curves over" not in page.text
    assert "nan" not in page.text.lower().split() and "None" not in page.text.replace("None was saved", "")


def test_a_run_of_a_hundred_thousand_steps_is_a_small_page(run: Callable[..., Path]) -> None:
    root = run(val(0, 3.0))
    noise = np.random.default_rng(0).random(100_000)
    lines = [train(s, loss=3 + float(noise[s]), grad_norm=float(noise[s]), data_wait_ms=float(noise[-s])) for s in range(100_000)]
    facts = read_run(root)
    facts.train.extend(lines)
    facts.val.extend(val(s, 2.0 + 1 / (1 + s)) for s in range(1, 100_000, 50))
    panels = learned_panels(facts) + course_panels(facts)
    assert all(len(series.curve.steps) <= MAX_POINTS for panel in panels for series in panel.series)
    page = Page(render_page(facts, summarise(facts), draw_charts(facts)))
    assert len(page.source) < 600_000
    assert "<title>step" not in page.source  # no mark for each of 2,000 validations


def test_bins_keep_mean_and_extremes_and_leave_gaps_where_nothing_was_finite() -> None:
    lines = [{"step": s, "loss": None if 40 <= s < 60 or s == 5 else float(s)} for s in range(100)]
    found = curve(lines, "loss", max_points=10)
    assert found is not None and found.binned
    assert found.low[0] == 0.0 and found.high[0] == 9.0 and found.mean[0] == pytest.approx((45 - 5) / 9)
    assert found.steps.tolist() == [4.5 + 10 * i for i in range(10)]
    assert np.isnan(found.mean).tolist() == [i in (4, 5) for i in range(10)]
    assert curve([{"step": 0, "loss": None}], "loss") is None and curve([], "loss") is None


def test_a_few_large_values_make_the_scale_logarithmic(run: Callable[..., Path]) -> None:
    waits = [train(s, data_wait_ms=500.0 if s == 0 else 0.0 if s == 3 else 0.1) for s in range(20)]
    panels = {panel.key: panel for panel in course_panels(read_run(run(*waits)))}
    assert panels["data_wait_ms"].logarithmic and not panels["tok_per_sec"].logarithmic


def test_a_checkpoint_whose_file_was_cut_short_is_not_called_whole(run: Callable[..., Path]) -> None:
    root = run(*whole_run())
    for step, size in ((10, 1000), (20, 999)):
        folder = root / f"checkpoints/step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"x" * size)
        (folder / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": {"bytes": 1000, "xxh3_64": "0"}}}))
    page = written(root)
    assert "not whole: model.safetensors is missing or has another size than its manifest says" in page.text
    assert summarise(read_run(root))["last_checkpoint"] == "step_00000010"


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.integers(), max_size=2)
KEYS = ["step", "loss", "lr", "grad_norm", "mfu", "tok_per_sec", "total_training_time_s", "tokens", "core_metric", "tasks", "val_bpb"]

LINES = st.dictionaries(st.sampled_from(KEYS), VALUES)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["train", "val", "core"]), LINES, st.dictionaries(st.text(max_size=3), VALUES))
def test_whatever_stands_in_a_line_there_is_a_page(tmp_path: Path, kind: str, changed: Line, tasks: dict[str, Any]) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: tiny}\n")
    lines = [train(0), val(0, 3.0), core(0, 0.1, TASKS | {"x": tasks}), {"step": 1, **train(1), "kind": kind, **changed}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = read_run(tmp_path)
    assert_harmless(Page(render_page(facts, summarise(facts), Charts())))
    for panel in learned_panels(facts) + course_panels(facts):
        assert isinstance(panel.logarithmic, bool) and panel.caption
    done = progress(facts)
    assert done.seconds is None or np.isfinite(done.seconds_at(np.array([0.0, 1.0]))).all()
