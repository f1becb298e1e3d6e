"""What a person sees of a run: on a terminal a progress bar below the log lines, elsewhere plain lines.

Everything is built as rich `Text`, never as markup, so that a model's `[red]` stays what it is. A console that can no longer
be written (a closed pipe, a vanished terminal) falls silent; it never stops a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from picotrain import invocation, terminal
from picotrain.config.schema import Config
from picotrain.terminal import Printer
from picotrain.text import brief, clock, flops, printable, several, short, size

LABEL, STRONG, GOOD, BAD = "dim", "bold", "green", "yellow"
LEAST_BAR = 10  # columns


class Console:
    """Logs the lines of one run, and prints them to `stream` (standard output when None) where picotrain's log is printed."""

    def __init__(self, num_steps: int, stream: TextIO | None = None, width: int | None = None):
        self.num_steps = num_steps
        self._out = Printer(stream, width)
        self.live = self._out.rich is not None and terminal.is_printed()
        self._progress: Progress | None = None
        self._fields: list[tuple[int, Text]] = []  # beside the bar
        self._silent = False

    def banner(self, lines: Sequence[tuple[str, str]]) -> None:
        """The start of a run: a title, then one line for each (label, fact)."""
        (_, title), *facts = lines
        self._print(Text("picotrain ", LABEL), Text(printable(title), STRONG))
        for label, fact in facts:
            self._print(Text(f"  {label:<12}", LABEL), fact)

    def advance(self, step: int, record: Mapping[str, Any], eta_s: float | None) -> None:
        """Move the bar to `step` steps done; without a terminal nothing happens."""
        if not self.live or self._silent:
            return
        fields = [
            (0, Text(f"{100 * step / self.num_steps:.1f}%")),
            (2, Text(f"loss {_loss(record['smooth_loss'])}")),
            (3, Text(f"{short(record['tok_per_sec'])} tok/s")),
            (1, Text(clock(record["total_training_time_s"]))),
            (0, Text(f"eta {_eta(eta_s)}")),
        ]
        self._fields = fields
        self._move("training", completed=step)

    def phase(self, what: str) -> None:
        """Say beside the bar what goes on when it is not training."""
        if self.live and not self._silent:
            self._move(printable(what))

    def _move(self, what: str, **values: Any) -> None:
        """Draw the bar after `what`, with the fields that leave it some room."""
        info = "  ".join(field.plain for field in fit(self._fields, self._width - len(what) - 1 - LEAST_BAR))
        self._guard(lambda: self._bar().update(self._task, description=what, info=info, **values))

    def train(self, record: Mapping[str, Any], eta_s: float | None, peak_bytes: int | None = None) -> None:
        """The log line of a step; on a narrow terminal the least important fields are left out. peak_bytes: the most memory so far."""
        fields = train_fields(record, self.num_steps, eta_s, peak_bytes)
        kept = fit(fields, self._width) if self.live else [text for _, text in fields]
        self._print(Text.assemble(kept[0], "  "), Text("  ").join(kept[1:]))

    def val(self, step: int, val_bpb: float | None, val_loss: float | None, tokens: int, best_bpb: float | None) -> None:
        """A validation; `best_bpb` is the lowest before it, None at the first. A narrow terminal gets what matters most."""
        fields = [
            (0, _field("val_bpb", _fixed(val_bpb), STRONG)),
            (1, _field("val_loss", _fixed(val_loss))),
            (2, Text(f"{short(tokens)} tokens", LABEL)),
        ]
        if val_bpb is not None and best_bpb is not None:
            change, better = f"{val_bpb - best_bpb:+.4f}", val_bpb < best_bpb
            fields.append((0, Text(*((f"* best so far, {change}", GOOD) if better else (f"{change} on the best, {best_bpb:.4f}", BAD)))))
        head = self._step(step)
        self._print(head, Text("  ").join(fit(fields, self._width - head.cell_len) if self.live else [text for _, text in fields]))

    def core(self, step: int, record: Mapping[str, Any]) -> None:
        """The CORE metric, over how many tasks, and why any is missing."""
        line = Text.assemble(("core_metric ", LABEL), (_fixed(record["core_metric"]), STRONG))
        line.append(f"  {record['evaluated']} of {record['of']} tasks, {printable(record['baseline_table'])}", LABEL)
        self._print(self._step(step), line)
        for label, problem in record["problems"].items():
            self._print(" " * 10, Text(printable(f"{label}: {problem}"), BAD))

    def figures(self, step: int, kind: str, figures: Mapping[str, float]) -> None:
        """What an evaluation of another package has measured."""
        fields = [_field(printable(name), f"{value:.4g}") for name, value in figures.items()]
        self._print(self._step(step), Text("  ").join([Text(printable(kind), LABEL), *fields]))

    def sample(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """What the model writes: each prompt, in brackets, then its continuation."""
        self._print(self._step(step), Text("samples", LABEL))
        for sample in samples:
            prompt = printable(sample["prompt"])
            self._print(" " * 4, Text.assemble(("[", LABEL), (prompt, STRONG), ("]", LABEL), printable(sample["text"])))

    def checkpoint(self, step: int, path: str, n_bytes: int, seconds: float) -> None:
        """A checkpoint that was written."""
        self._print(self._step(step), Text.assemble(("saved ", LABEL), f"{printable(path)}  {size(n_bytes)} in {brief(seconds)}"))

    def event(self, step: int, name: str, message: str) -> None:
        """Something that happened to the run."""
        head = Text.assemble(self._step(step), (name, STRONG), "  " if message else "")
        self._print(head, message)

    def warn(self, message: str) -> None:
        """A line that should be seen."""
        self._tell(lambda out: out.message(message, BAD))

    def close(self) -> None:
        """Take the bar away and give the cursor back. May be called twice."""
        if self._progress:
            self._guard(self._progress.stop)
            self._progress = None

    @property
    def _width(self) -> int:
        return self._out.rich.width if self._out.rich else 0

    def _step(self, step: int) -> Text:
        return Text.assemble((f"{step:>{len(str(self.num_steps))}}/{self.num_steps}", LABEL), "  ")

    def _bar(self) -> Progress:
        if self._progress is None:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), TextColumn("{task.fields[info]}"))
            self._progress = Progress(*columns, console=self._out.rich, expand=True, transient=True, refresh_per_second=4)
            self._task = self._progress.add_task("training", total=self.num_steps, info="")
            self._progress.start()
        return self._progress

    def _print(self, head: str | Text, body: str | Text = "") -> None:
        self._tell(lambda out: out.line(head, body))

    def _tell(self, draw: Callable[[Printer], object]) -> None:
        terminal.tell(terminal.plain(lambda stream: draw(Printer(stream))), lambda: self._guard(lambda: draw(self._out)))

    def _guard(self, action: Callable[[], object]) -> None:
        if self._silent:
            return
        try:
            action()
        except (OSError, ValueError):  # ValueError: the stream was closed
            self._silent = True


def banner(plan: Mapping[str, Any], config: Config, run_dir: Path) -> list[tuple[str, str]]:
    """What is about to be trained, on what and where: a title and (label, fact) pairs."""
    parts = plan["parameters"]
    by_part = ", ".join(f"{name} {short(count)}" for name, count in parts.items() if name != "total")
    factors = {"device_batch_size": "rows", "seq_len": "tokens", "dp_size": "ranks", "grad_accum_steps": "micro-batches"}
    batch = " x ".join(f"{plan[key]:,} {what}" for key, what in factors.items() if plan[key] > 1)
    epochs = f" = {plan['epochs']:.2f} epochs" if plan["epochs"] else ""
    peak = f", peak {flops(plan['peak_flops'])}/s each" if plan["peak_flops"] else ""
    kernels = f"attention by {plan['attention']}" + (f", in windows by {plan['window_attention']}" if plan["window_attention"] else "")
    return [
        ("", plan["name"]),
        ("model", f"{short(parts['total'])} parameters ({by_part}), {flops(plan['flops_per_token'])}s a token"),
        ("batch", f"{plan['total_batch_size']:,} tokens a step = {batch}"),
        ("horizon", f"{several(plan['num_steps'], 'step')} = {short(plan['num_steps'] * plan['total_batch_size'])} tokens{epochs}"),
        ("device", f"{plan['world_size']} x {plan['hardware_name']} ({plan['device']}), {plan['precision']}{peak}, {kernels}"),
        ("data", f"{config.data.name}, {several(plan['lanes'], 'lane')}, vocabulary of {config.tokenizer.vocab_size:,}"),
        ("run", invocation.shown(run_dir)),
    ]


def train_fields(record: Mapping[str, Any], num_steps: int, eta_s: float | None, peak_bytes: int | None = None) -> list[tuple[int, Text]]:
    """The fields of a log line, each with its rank: of those above 0, the highest is the first to go where space is short."""
    step = record["step"] + 1  # steps done
    mfu = [] if record["mfu"] is None else [(3, _field("mfu", f"{100 * record['mfu']:4.1f}%"))]  # where the peak is known
    memory = [] if peak_bytes is None else [(5, _field("mem", f"{size(peak_bytes):>7}"))]
    return [
        (0, Text(f"{step:>{len(str(num_steps))}}/{num_steps}", STRONG)),
        (0, _field("loss", _loss(record["smooth_loss"]), STRONG)),
        (2, _field("lr", f"{record['lr']:.1e}")),
        (4, _field("grad", _norm(record["grad_norm"]))),
        (1, _field("dt", f"{brief(record['dt_ms'] / 1000):>5}")),
        (0, Text.assemble(f"{short(record['tok_per_sec']):>5}", (" tok/s", LABEL))),
        *mfu,
        *memory,
        (6, _field("ep", f"{record['epoch']:.2f}")),
        (9, _field("rank", str(record["rank"]))),
        (8, Text.assemble(_field("pq", f"{record['pq']:>2}"), " ", _field("rg", f"{record['rg']:>2}"))),
        (7, Text(f"{clock(record['total_training_time_s']):>5}")),
        (0, _field("eta", _eta(eta_s))),
    ]


def fit(fields: Sequence[tuple[int, Text]], width: int) -> list[Text]:
    """The fields that fit into `width` columns with two blanks between them."""
    kept = list(fields)
    while sum(len(text) + 2 for _, text in kept) - 2 > width:
        worst = max(kept, key=lambda field: field[0])
        if worst[0] == 0:
            break
        kept.remove(worst)
    return [text for _, text in kept]


def _field(label: str, value: str, style: str = "") -> Text:
    return Text.assemble((f"{label} ", LABEL), (value, style))


def _loss(value: float | None) -> str:
    """Always six characters wide."""
    return "   n/a" if value is None else f"{value:.4f}" if value < 9.99995 else f"{value:.3f}"


def _norm(value: float | None) -> str:
    """Five characters wide below 1,000."""
    if value is None:
        return "  n/a"
    return f"{value:.1e}" if value >= 999.95 else f"{value:.{3 if value < 9.9995 else 2 if value < 99.995 else 1}f}"


def _fixed(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _eta(seconds: float | None) -> str:
    return "?" if seconds is None else clock(seconds)
