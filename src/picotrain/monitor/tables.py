"""What a profile says, as Markdown that a person reads: where the time of a step goes, and who holds its memory. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from picotrain.markdown import Markdown, table
from picotrain.text import several, size

TOP, LEAST = 25, 0.001  # rows of a table, and the share of the whole that is worth one; the rest is one line below them
NO_OPERATOR = "(no operator: Python, waiting)"
IN_CODE = str.maketrans("|`", "/'")  # what would end a cell, or the code in it
MAX_NAME = 90  # characters of a name: those of C++ templates run to thousands


@dataclass(frozen=True)
class Timed:
    """An operator on the host or a kernel on the device, over all its calls in the window: the time in itself, not in what it calls."""

    name: str
    shapes: str  # of its inputs; "" where they are not known
    calls: int
    self_ms: float


@dataclass(frozen=True)
class Allocation:
    """Bytes taken (above 0) or given back (below) by what ran at that time: an operator, or NO_OPERATOR."""

    time_ns: int
    address: int
    bytes: int
    total_bytes: int  # allocated on the device after it
    by: str


@dataclass(frozen=True)
class Window:
    """What was looked at: whole steps, and how long they took in all."""

    title: str
    first: int
    steps: int
    wall_ms: float
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        return f"step {self.first}" if self.steps == 1 else f"steps {self.first} to {self.first + self.steps - 1}"

    def heading(self) -> list[str]:
        """The first lines of every table."""
        took = f"{several(self.steps, 'step')}, {self.wall_ms / self.steps:,.1f} ms each, the profiler's own cost included"
        return [f"# {self.title}: {self}", "; ".join([took, *self.notes]) + "."]


def by_name(rows: Iterable[Timed]) -> list[Timed]:
    """One row a name, whatever the shapes; the longest first."""
    merged: dict[str, Timed] = {}
    for row in rows:
        before = merged.get(row.name, Timed(row.name, "", 0, 0.0))
        merged[row.name] = replace(before, calls=before.calls + row.calls, self_ms=before.self_ms + row.self_ms)
    return _sorted(merged.values())


def _sorted(rows: Iterable[Timed]) -> list[Timed]:
    return sorted(rows, key=lambda row: -row.self_ms)


def headline(rows: Sequence[Timed], window: Window, count: int = 3) -> str:
    """The few that take most of the time: "mm 49 %, mul 14 %"."""
    named = [row for row in by_name(rows) if row.name != NO_OPERATOR][:count]
    return ", ".join(f"{_name(row.name.removeprefix('aten::'), 50)} {100 * row.self_ms / window.wall_ms:.0f} %" for row in named)


def kernels_markdown(window: Window, host: Sequence[Timed], device: Sequence[Timed] | None) -> str:
    """kernels.md: kernels of the device by their time, then operators of the host by the time in themselves, by name and by
    shape. Shares are of the window's wall time. `device`: None on a CPU, where operators are all there is."""
    parts = window.heading()
    if device is not None:
        busy = 100 * sum(row.self_ms for row in device) / window.wall_ms
        parts += ["## Kernels by time on the device"]
        if device:
            parts += [f"Together {busy:.1f} % of the wall time; streams run side by side, so that it may be above 100 %."]
            parts += [_timed(by_name(device), window, "kernel")]
        else:
            parts += ["None was recorded. CUPTI, which records them, said why on standard error; often it wants more rights."]
    parts += ["## Operators by their own time on the host"]
    if device is not None:
        parts += ["The host runs ahead of the device: this time counts only where the device waits for it."]
    parts += [_timed(by_name(host), window, "operator"), "## The same by the shapes of their inputs"]
    parts += [_timed(_sorted(row for row in host if row.shapes), window, "operator", with_shapes=True)]
    return "\n\n".join(parts) + "\n"


def memory_markdown(window: Window, allocations: Sequence[Allocation], device: str) -> str:
    """memory.md: by what allocated them, the bytes alive at the peak, and all that was allocated in a step."""
    ordered = sorted(allocations, key=lambda allocation: allocation.time_ns)
    parts = [*window.heading(), f"Nothing was allocated on {device}."]
    if ordered:
        at_peak = max(range(len(ordered)), key=lambda i: ordered[i].total_bytes)
        before, peak = ordered[0].total_bytes - ordered[0].bytes, ordered[at_peak].total_bytes
        said = f"At the peak these steps held {size(peak)} on {device}, beside what was there before (weights, optimizer state)."
        if before > 0:
            said = f"At the peak {size(peak)} were allocated on {device}: {size(before)} before these steps, {size(peak - before)} in them."
        head = ["allocated by", "alive at the peak", "in blocks", "allocated a step"]
        parts[-1:] = [said, table(head, _holders(ordered, at_peak, window.steps))]
    return "\n\n".join(parts) + "\n"


def _holders(ordered: Sequence[Allocation], at_peak: int, steps: int) -> list[list[str]]:
    """The rows of memory.md: who holds most after `ordered[at_peak]` first, then who allocates most."""
    alive: dict[int, Allocation] = {}
    for allocation in ordered[: at_peak + 1]:
        if allocation.bytes > 0:
            alive[allocation.address] = allocation
        else:
            alive.pop(allocation.address, None)
    held, count, taken = Counter[str](), Counter[str](), Counter[str]()
    for allocation in alive.values():
        held[allocation.by] += allocation.bytes
        count[allocation.by] += 1
    for allocation in ordered:
        taken[allocation.by] += max(allocation.bytes, 0)
    least = LEAST * sum(held.values())
    ranked = sorted(taken, key=lambda by: (-held[by] if held[by] >= least else 0, -taken[by]))
    top = [by for by in ranked if held[by] >= least or taken[by] >= least * steps][:TOP]
    rest = [by for by in ranked if by not in top]
    rows = []
    for shown, names in [*((_code(by), [by]) for by in top), *([(f"{len(rest):,} others", rest)] if rest else [])]:
        bytes_held, blocks, bytes_taken = (sum(counter[by] for by in names) for counter in (held, count, taken))
        rows.append([shown, size(bytes_held), f"{blocks:,}", size(bytes_taken / steps)])
    return rows


def _timed(rows: Sequence[Timed], window: Window, what: str, with_shapes: bool = False) -> Markdown:
    shown = [row for row in rows if row.self_ms >= LEAST * window.wall_ms][:TOP]
    cells = [[_code(row.name), *([_code(row.shapes)] if with_shapes else []), *_figures(row, window)] for row in shown]
    if rest := rows[len(shown) :]:
        others = Timed("", "", sum(row.calls for row in rest), sum(row.self_ms for row in rest))
        cells.append([f"{len(rest):,} others", *([""] if with_shapes else []), *_figures(others, window)])
    return table([what, *(["shapes"] if with_shapes else []), "share", "ms a step", "calls a step", "µs a call"], cells)


def _figures(row: Timed, window: Window) -> list[str]:
    share, each_ms = 100 * row.self_ms / window.wall_ms, row.self_ms / window.steps
    if not row.calls:
        return [f"{share:.1f} %", f"{each_ms:,.2f}", "", ""]
    calls = f"{row.calls / window.steps:,.1f}".removesuffix(".0")
    return [f"{share:.1f} %", f"{each_ms:,.2f}", calls, f"{1000 * row.self_ms / row.calls:,.1f}"]


def _name(name: str, most: int = MAX_NAME) -> str:
    return name if len(name) <= most else name[: most - 3] + "..."


def _code(text: str) -> str:
    """Names as code, since `__` and `<` mean something in Markdown; a phrase of our own as it is."""
    return text if text.startswith("(") else Markdown(f"`{_name(text).translate(IN_CODE)}`")
