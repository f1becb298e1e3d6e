"""What a line of a benchmark says, as rows of the table. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from picotrain.text import brief, short


class Row(NamedTuple):
    """One figure. reference: what it is to be compared with."""

    benchmark: str
    setting: str
    figure: str
    unit: str
    reference: str = ""


Line = dict[str, Any]


def rows(line: Line) -> list[Row]:
    """The rows of a line."""
    name = line["benchmark"]
    if "not_measured" in line:
        return [Row(name, line.get("mode", ""), "-", "", f"not measured: {line['not_measured']}")]
    return [Row(name, *row) for row in _ROWS[name](line)]


Found = list[tuple[str, ...]]  # rows without the benchmark's name


def _matmul(line: Line) -> Found:
    share = f"{line['of_peak']:.0%} of the data sheet's peak" if line["of_peak"] else ""
    return [(f"{line['precision']}, {line['size']:,} x {line['size']:,}", short(line["gflops"]), "GFLOP/s", share)]


def _step(line: Line) -> Found:
    mode = [line["precision"], *["compiled"] * line["compile"], *[line["optimizer"]] * (line["optimizer"] != "adamw"), *line["set"]]
    setting = f"d{line['depth']} {' '.join(mode)}, {line['batch']} x {line['seq_len']:,}"
    setting += f" x {line['grad_accum']}" if line["grad_accum"] > 1 else ""
    mfu = f"MFU {line['mfu']:.1%}, " if line["mfu"] is not None else ""
    parts = ", ".join(f"{part} {short(line[f'{part}_ms'])}" for part in ("forward", "backward", "optimizer"))
    warm = f"{brief(line['first_step_warm_s'])} in later processes" if line.get("first_step_warm_s") is not None else ""
    peak = f"{line['peak_device_mib'] or line['peak_rss_mib']:,}"
    return [
        (setting, short(line["tok_per_sec"]), "tokens/s", f"{mfu}{line['of_ceiling']:.0%} of the matmul ceiling"),
        ("  a step", short(line["step_ms"]), "ms", parts),
        ("  the first step", f"{line['first_step_s']:.2f}", "s", warm),
        ("  peak memory", peak, "MiB", f"{line['of_predicted']:.0%} of the plan's prediction"),
    ]


def _loader(line: Line) -> Found:
    setting, dropped = f"{line['corpus']}, {line['rows']} x {line['seq_len']:,}", f"{line['dropped_percent']} % of the text dropped"
    first = ("  the first batch", f"{line['first_batch_s']:.2f}", "s")
    return [(setting, short(line["tokens_per_s"]), "tokens/s", dropped), first]


def _startup(line: Line) -> Found:
    if line["mode"] == "help":
        return [("picotrain --help", f"{line['command_s']:.2f}", "s", "")]
    cold = f"{brief(line['first_step_cold_s'])} with an empty compile cache" if "first_step_cold_s" in line else ""
    return [(f"d{line['depth']} {line['mode']}, to the first step", f"{line['first_step_s']:.2f}", "s", cold)]


_ROWS: dict[str, Callable[[Line], Found]] = {"matmul": _matmul, "step": _step, "loader": _loader, "startup": _startup}
