"""The report: written for runs in any state, true about them, and safe with whatever text is in them."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from picotrain.errors import RunError
from picotrain.markdown import cell, fence, table
from picotrain.metrics import MetricsFile
from picotrain.report import console_summary, evaluated, read_run, summarise, write_report

Line = dict[str, Any]


def train(steps: int, first: int = 0) -> list[Line]:
    """Lines of a run at 1,000 tokens/s whose first step took 60 s."""
    return [
        {
            "step": s, "kind": "train", "loss": 5.0 - 0.01 * s, "smooth_loss": 5.1 - 0.01 * s, "lr": 0.1, "grad_norm": 1.0, "tokens": 100,
            "tok_per_sec": 1000.0 if s else 1.0, "mfu": 0.25 if s else 0.01,
            "dt_ms": 100.0 if s else 60_000.0, "data_wait_ms": 10.0 if s else 0.0,
            "epoch": s / 100, "rank": 0, "world_size": 1, "pq": 0, "rg": 0, "total_training_time_s": 60.0 + 0.1 * s,
        }
        for s in range(first, steps)
    ]  # fmt: skip


def val(step: int, bpb: float | None) -> Line:
    return {"step": step, "kind": "val", "val_bpb": bpb, "val_loss": bpb and 2 * bpb, "tokens": 1000}


def event(step: int, name: str, time: str = "2026-01-01T00:00:00+00:00") -> Line:
    return {"step": step, "kind": "event", "name": name, "message": "", "time": time}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """A run directory of 20 planned steps with these lines in its metrics.jsonl."""

    def build(*lines: Line, checkpoints: dict[int, float | None] | None = None) -> Path:
        root = tmp_path / "run"
        root.mkdir()
        (root / "config.yaml").write_text("run: {name: tiny, seed: 7}\ndata: {name: files}\noptimizer: {kind: adamw, matrix_lr: 0.02}\n")
        plan = {"name": "tiny", "num_steps": 20, "total_batch_size": 100, "parameters": {"total": 12345, "head": 45}, "vocab_size": 300}
        (root / "plan.json").write_text(json.dumps(plan))
        if lines:
            file = MetricsFile(root / "metrics.jsonl")
            for line in lines:
                file.write(line)
            file.close()
        for step, bpb in (checkpoints or {}).items():
            folder = root / "checkpoints" / f"step_{step:08d}"
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(b"x" * 1000)
            (folder / "manifest.json").write_text("{}")
            if bpb is not None:
                (folder / "metrics.json").write_text(json.dumps({"step": step, "val_bpb": bpb}))
        return root

    return build


def text_of(root: Path) -> str:
    return unpadded((root / "report.md").read_text(encoding="utf-8"))


def unpadded(text: str) -> str:
    """Markdown without the blanks that make its tables readable as they are."""
    return re.sub(r"(?m)(?<=\|) +| +(?=\|)", " ", text)


def test_a_finished_run_reports_what_was_reached(run: Callable[..., Path]) -> None:
    root = run(
        event(0, "started"), val(0, 3.0), *train(10), val(10, 1.2), *train(20, first=10), val(20, 1.5), event(20, "finished"),
        checkpoints={10: 1.2, 20: 1.5},
    )  # fmt: skip
    summary = write_report(root)
    assert json.loads((root / "summary.json").read_text()) == summary
    expected = {
        "name": "tiny", "status": "finished", "num_steps": 20, "steps_done": 20, "tokens": 2000, "improved": True, "validations": 3,
        "initial_val_bpb": 3.0, "initial_val_step": 0, "best_val_bpb": 1.2, "best_val_step": 10, "final_val_bpb": 1.5, "final_val_step": 20,
        "final_val_loss": 3.0, "val_bpb_ratio": 0.5, "best_checkpoint": "step_00000010", "last_checkpoint": "step_00000020",
        "parameters": 12345, "vocab_size": 300, "data": "files", "core_metric": None, "resumes": 0,
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == expected
    assert summary["smooth_train_loss"] == pytest.approx(4.91)
    text = text_of(root)
    assert "**Yes.** On unseen text the model went from 3.0000 bits per byte at step 0 to 1.5000 at step 20: 0.500 of the start." in text
    assert "best at step 10, with 1.2000, and is 25.00 % above" in text
    assert "![training loss and validation bits per byte over steps](loss.png)" in text
    assert "CORE: not evaluated." in text


def test_throughput_leaves_out_the_first_step_and_the_total_does_not(run: Callable[..., Path]) -> None:
    summary = write_report(run(*train(11)))
    assert (summary["median_tok_per_sec"], summary["median_mfu"], summary["median_dt_ms"]) == (1000.0, 0.25, 100.0)
    assert summary["data_wait_share"] == pytest.approx(0.1)
    assert summary["total_training_time_s"] == pytest.approx(61.0)


@pytest.mark.parametrize(
    ("lines", "running", "status"),
    [
        ([event(0, "started"), *train(20), event(20, "finished")], False, "finished"),
        ([event(0, "started"), *train(20)], False, "interrupted"),  # killed before the last save
        (train(20), False, "finished"),
        ([event(0, "started"), *train(5), event(5, "stopped")], False, "stopped"),
        ([event(0, "started"), *train(5), event(5, "stopped"), event(5, "resumed"), *train(9, first=5)], False, "interrupted"),
        ([event(0, "started"), *train(5)], True, "running"),
        ([event(0, "started"), *train(5), event(4, "diverged")], True, "diverged"),
        ([event(0, "started"), *train(5), event(5, "finished")], False, "interrupted"),  # and the horizon was moved since
        ([], False, "interrupted"),
    ],
)
def test_the_status_follows_from_what_was_recorded(run: Callable[..., Path], lines: list[Line], running: bool, status: str) -> None:
    assert summarise(read_run(run(*lines)), running)["status"] == status


@pytest.mark.parametrize(
    ("lines", "improved", "words"),
    [
        ([], None, "**Not known.** Validation was never measured"),
        ([val(0, 3.0)], None, "**Not known yet.** Validation was measured once: 3.0000 bits per byte at step 0"),
        ([val(0, None), val(10, 2.0)], None, "**Not known yet.** Validation was measured once: 2.0000 bits per byte at step 10"),
        ([val(0, 3.0), val(10, 3.2)], False, "**No.** On unseen text the model had 3.0000 bits per byte at step 0 and was never better"),
    ],
)
def test_the_verdict_claims_no_more_than_was_measured(
    run: Callable[..., Path], lines: list[Line], improved: bool | None, words: str
) -> None:
    root = run(*lines, *train(11))
    assert write_report(root)["improved"] is improved
    assert words in text_of(root)


def test_a_run_of_which_nothing_was_measured_has_a_report_without_a_picture(run: Callable[..., Path]) -> None:
    root = run()
    summary = write_report(root)
    assert (summary["steps_done"], summary["median_tok_per_sec"], summary["best_checkpoint"]) == (0, None, None)
    assert not (root / "loss.png").exists() and "loss.png" not in text_of(root)
    assert "there is no metrics.jsonl" in text_of(root)


def test_a_torn_tail_is_passed_over_and_damage_is_said(run: Callable[..., Path]) -> None:
    root = run(*train(5))
    whole = (root / "metrics.jsonl").read_bytes()
    (root / "metrics.jsonl").write_bytes(whole + b'{"step": 5, "ki')
    assert write_report(root)["steps_done"] == 5
    assert "Note" not in text_of(root)
    (root / "metrics.jsonl").write_bytes(whole + b"\x00\x00\n" + whole)
    assert write_report(root)["steps_done"] == 5
    assert "line 6 is damaged" in text_of(root)


def test_broken_json_beside_the_metrics_is_a_note_not_an_end(run: Callable[..., Path]) -> None:
    root = run(*train(5), val(5, 2.0))
    (root / "plan.json").write_text('{"name": ')
    (root / "data.json").write_text("[]")
    summary = write_report(root)
    assert (summary["name"], summary["num_steps"], summary["tokens"]) == ("tiny", None, 500)
    assert "> **Note:** plan.json cannot be read" in text_of(root)


@pytest.mark.parametrize("name", ["metrics.cut.jsonl", "metrics.cut-0001.jsonl"])  # the latter: of runs from before
def test_lines_that_a_resume_cut_off_still_count_as_events(run: Callable[..., Path], name: str) -> None:
    root = run(event(0, "started", "2026-01-01T00:00:00"), *train(8), event(5, "resumed", "2026-01-03T00:00:00"))
    (root / name).write_text(json.dumps(event(7, "stopped", "2026-01-02T00:00:00")) + "\n" + json.dumps(train(99)[98]) + "\n")
    facts = read_run(root)
    assert [e["name"] for e in facts.events] == ["started", "stopped", "resumed"]
    assert summarise(facts)["steps_done"] == 8
    assert summarise(facts)["resumes"] == 1


def test_the_best_checkpoint_is_what_the_pointer_names_and_is_whole(run: Callable[..., Path]) -> None:
    root = run(*train(20), checkpoints={5: 1.4, 10: 1.2, 15: 1.3, 20: None})
    assert write_report(root)["best_checkpoint"] == "step_00000010"
    (root / "checkpoints" / "best").write_text("step_00000015\n")
    assert write_report(root)["best_checkpoint"] == "step_00000015"
    (root / "checkpoints" / "step_00000015" / "manifest.json").unlink()
    summary = write_report(root)
    assert (summary["best_checkpoint"], summary["checkpoints"]) == ("step_00000010", 3)
    assert "not whole" in text_of(root)


@pytest.mark.parametrize("text", ["plain", "``` \n# not a title", "`````` six", "a | b </details> <b>"])
def test_nothing_in_a_sample_closes_its_fence(run: Callable[..., Path], text: str) -> None:
    root = run(*train(5), {"step": 5, "kind": "sample", "samples": [{"prompt": "P", "text": text}, {"prompt": "", "text": "x\x1b[31m"}]})
    write_report(root)
    page = text_of(root)
    block = re.search(r"^(`{3,})text\n\[P\](.*?)\n\1$", page, re.MULTILINE | re.DOTALL)
    assert block is not None and block[2] == text
    assert "\x1b" not in page


def test_a_fence_is_longer_than_any_run_of_backticks_inside() -> None:
    assert fence("a ```` b", "yaml") == "`````yaml\na ```` b\n`````"
    assert fence("a", "yaml") == "```yaml\na\n```"


def test_table_cells_neutralise_markup(run: Callable[..., Path]) -> None:
    root = run(event(0, "a|b <img src=x> *c* [d](e) _f_ g_h\nline"), *train(1))
    write_report(root)
    assert r"| a\|b \<img src=x\> \*c\* \[d\](e) \_f\_ g_h line |" in text_of(root)


def test_a_table_reads_well_as_it_is_and_escapes_what_is_in_it() -> None:
    text = table(("name", "share"), [("a|b", "3.5 %"), ("<x>", "12.0 %"), (None, None)])
    assert text.splitlines() == [
        "| name  |  share |",
        "| ----- | -----: |",
        r"| a\|b  |  3.5 % |",
        r"| \<x\> | 12.0 % |",
        "|       |        |",
    ]
    assert table(("name", "share"), []) == ""


def test_the_report_of_a_run_with_another_name_is_still_ours_and_notes_are_not(run: Callable[..., Path]) -> None:
    root = run(*train(5))
    write_report(root)
    (root / "plan.json").write_text(json.dumps({"name": "renamed"}))
    write_report(root)
    assert text_of(root).startswith("# renamed\n\nThis run ")
    (root / "report.md").write_text("# renamed\n\nWhat I think of this run.\n")
    write_report(root)
    assert "What I think" in text_of(root)


@pytest.mark.parametrize("name", ["test/test_sqlite3/__main__.py", "__init__.py", "a__b", "_a_b_", "x/_y_/z", "*a* [b](c) `d`"])
def test_a_name_is_shown_as_it_is(name: str) -> None:
    """By a reader of Markdown: results.md has files of a corpus in its tables."""
    (inline,) = [token for token in MarkdownIt().parse(cell(name)) if token.type == "inline"]
    assert {token.type for token in inline.children or ()} <= {"text", "text_special"}
    assert "".join(token.content for token in inline.children or ()) == name
    results = {"bpb": {"val": 1.0, "by_source": {name: 1.0}}, "val_loss": 1.0, "tokens": {"val": 1}, "core": None, "samples": []}
    assert f"| {cell(name)} | 1.0000 |" in unpadded(evaluated.render("run", results))


def test_the_whole_config_and_the_command_line_are_in_the_page(run: Callable[..., Path]) -> None:
    root = run(*train(1))
    (root / "overrides.txt").write_text("model=d2\ntrain.max_steps=20\n")
    write_report(root)
    page = text_of(root)
    assert "<details><summary>config.yaml</summary>\n\n```yaml\nrun: {name: tiny, seed: 7}" in page
    assert "| optimizer.matrix_lr | 0.02 |" in page
    assert "model=d2\ntrain.max_steps=20" in page


def test_a_long_validation_history_is_thinned_but_keeps_first_best_and_last(run: Callable[..., Path]) -> None:
    bpbs = {s: 3.0 - s / 1000 for s in range(0, 1001, 10)} | {370: 0.5}
    root = run(*(val(s, bpb) for s, bpb in bpbs.items()), *train(1))
    write_report(root)
    rows = re.findall(r"^\| ([\d,]+) \| \d\.\d{4} \|", text_of(root), re.MULTILINE)
    assert len(rows) <= 16 and rows[0] == "0" and rows[-1] == "1,000" and "370" in rows


def test_the_picture_is_a_png_that_grows_with_what_was_measured(run: Callable[..., Path]) -> None:
    root = run(*train(20), {**train(21)[20], "loss": float("nan")})
    write_report(root)
    one = (root / "loss.png").read_bytes()
    with (root / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(val(20, 1.0)) + "\n" + json.dumps(event(5, "resumed")) + "\n")
    write_report(root)
    two = (root / "loss.png").read_bytes()
    size = [(int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")) for png in (one, two)]
    assert one[:8] == two[:8] == b"\x89PNG\r\n\x1a\n"
    assert size[0][0] == size[1][0] == 1200 and size[1][1] > size[0][1]


def test_a_folder_that_is_no_run_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no config\.yaml, so it holds no run; .*picotrain train"):
        write_report(tmp_path)
    with pytest.raises(RunError, match="does not exist"):
        write_report(tmp_path / "nowhere")


def test_the_closing_lines_say_where_the_report_is(run: Callable[..., Path]) -> None:
    root = run(event(0, "started"), val(0, 3.0), *train(20), val(20, 1.5), event(20, "finished"), checkpoints={20: 1.5})
    stream = io.StringIO()
    console_summary(write_report(root), stream)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "  run         tiny: finished at step 20 of 20"
    assert "  validation  1.5000 bits per byte (step 0: 3.0000), best 1.5000 at step 20" in lines
    assert f"  report      {root / 'report.md'} and report.html" in lines
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(
    ("end", "wanted", "never"),
    [
        ("finished", "resume runs/tiny train.max_steps=40", "go on"),
        ("stopped", "resume runs/tiny", "train on"),
        ("diverged", "eval runs/tiny", "resume"),  # as it is it would diverge again
    ],
)
def test_the_last_lines_say_what_to_type(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, wanted: str, never: str
) -> None:
    monkeypatch.setenv("PICOTRAIN_COMMAND", ".venv/bin/picotrain")
    root = run(event(0, "started"), *train(20 if end == "finished" else 10), event(20, end), checkpoints={10: 1.5})
    target = tmp_path / "here" / "runs" / "tiny"
    shutil.copytree(root, target)
    monkeypatch.chdir(tmp_path / "here")
    stream = io.StringIO()
    console_summary(write_report(target), stream)
    said = stream.getvalue().split("  next\n")[1]
    assert ".venv/bin/picotrain sample runs/tiny" in said
    assert any(line.endswith(f".venv/bin/picotrain {wanted}") for line in said.splitlines()) and never not in said


def test_the_closing_lines_of_a_run_without_a_step_are_short(run: Callable[..., Path]) -> None:
    stream = io.StringIO()
    console_summary(write_report(run()), stream)
    assert [line.split()[0] for line in stream.getvalue().splitlines()][:2] == ["run", "report"]
