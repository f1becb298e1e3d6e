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
    size = f"{line['size']:,}"
    return [(f"{line['precision']}, {size} x {size}", short(line["gflops"]), "GFLOP/s", share)]


def _step(line: Line) -> Found:
    mode = [line["precision"], *["compiled"] * line["compile"], *["muon"] * (line["optimizer"] == "muon"), *line["set"]]
    batch = f"{line['batch']} x {line['seq_len']:,}" + (f" x {line['grad_accum']}" if line["grad_accum"] > 1 else "")
    mfu = f"MFU {line['mfu']:.1%}, " if line["mfu"] is not None else ""
    parts = [f"{part} {short(line[f'{part}_ms'])}" for part in ("forward", "backward", "optimizer")]
    peak = line["peak_device_mib"] or line["peak_rss_mib"]
    setting = f"d{line['depth']} {' '.join(mode)}, {batch}"
    warm = f"{brief(line['first_step_warm_s'])} in later processes" if line.get("first_step_warm_s") is not None else ""
    return [
        (setting, short(line["tok_per_sec"]), "tokens/s", f"{mfu}{line['of_ceiling']:.0%} of the matmul ceiling"),
        ("  a step", short(line["step_ms"]), "ms", ", ".join(parts)),
        ("  the first step", f"{line['first_step_s']:.2f}", "s", warm),
        ("  peak memory", f"{peak:,}", "MiB", f"{line['of_predicted']:.0%} of the plan's prediction"),
    ]


def _memory(line: Line) -> Found:
    mode = [line["precision"], *["compiled"] * line["compile"], *["muon"] * (line["optimizer"] == "muon"), *line["set"]]
    mode += [f"recompute {line['recompute']}"] * (line["recompute"] != "none")
    batch = f"{line['batch']} x {line['seq_len']:,}" + (f" x {line['grad_accum']}" if line["grad_accum"] > 1 else "")
    counted = f", {line['counted']}" if "counted" in line else ""
    compared = f"{line['ratio']:.0%} of the prediction{counted}"
    return [(f"d{line['depth']} {' '.join(mode)}, {batch}", f"{line['measured_mib']:,}", "MiB", compared)]


def _loader(line: Line) -> Found:
    usual, text = line.get("usual"), f"{line['corpus']}{', short documents' if line['short'] else ''}"
    rate = f"{line['times_usual']} times the usual method" if usual else ""
    first = f"{line['first_batch_times_usual']} times as fast as the usual method" if usual else ""
    return [
        (f"{text}, {line['rows']} x {line['seq_len']:,}", short(line["tokens_per_s"]), "tokens/s", rate),
        ("  the first batch", f"{line['first_batch_s']:.2f}", "s", first),
    ]


def _checkpoint(line: Line) -> Found:
    share = f"{line['stall_share']:.1%} of a save that waits ({brief(line['sync_s'])})"
    return [
        (f"d{line['depth']}, {line['state_mb']:,} MB: held by a save", short(1000 * line["stall_s"]), "ms", share),
        ("  a step meanwhile", f"{line['step_ms_while_saving']:,}", "ms", f"{line['slow_down']} times a step without a save"),
    ]


def _signal(line: Line) -> Found:
    longest = f"longest of {line['times']}: {brief(line['longest_s'])}"
    return [
        (f"d{line['depth']}: signal to whole checkpoint", f"{line['signal_to_whole_s']:.2f}", "s", longest),
        ("  signal to the end", f"{line['signal_to_exit_s']:.2f}", "s", ""),
    ]


def _sampling(line: Line) -> Found:
    setting, one, plain = f"d{line['depth']} {line['precision']}", line["batch_1"], line["batch_1_without_cache"]
    return [
        (f"{setting}, 1 row", short(one), "tokens/s", f"{one / plain:.1f} times the rate without a cache"),
        ("  8 rows", short(line["batch_8"]), "tokens/s", f"{line['batch_8'] / one:.1f} times one row"),
    ]


def _startup(line: Line) -> Found:
    if line["mode"] == "help":
        return [("picotrain --help", f"{line['command_s']:.2f}", "s", "")]
    cold = f"{brief(line['first_step_cold_s'])} with an empty compile cache" if "first_step_cold_s" in line else ""
    return [(f"d{line['depth']} {line['mode']}, to the first step", f"{line['first_step_s']:.2f}", "s", cold)]


def _corpus_start(line: Line) -> Found:
    seen = "from the cached manifest" if line["cached"] else "every footer read"
    seconds = line["scan_s"] + line["first_batch_s"]
    return [(f"{line['shards']:,} shards, {seen}", f"{seconds:.2f}", "s", "from the scan to the first batch")]


def _corpus_ranks(line: Line) -> Found:
    least, most = line["rows_per_rank"]
    setting, rows_per_rank = f"{line['dp_size']:,} ranks, {line['lanes']:,} lanes", f"{least:,} to {most:,} rows a rank"
    return [(setting, short(line["cpu_ms_per_1000_rows"]), "ms per 1,000 rows", rows_per_rank)]


def _core(line: Line) -> Found:
    if line["task"] != "all":
        return []
    differ = f"{line['mismatches']} of {line['examples']:,} predictions differ"
    return [(f"d{line['depth']} {line['precision']}, all tasks", f"{line['ratio']}", "times", f"the plain implementation; {differ}")]


def _time_to_bpb(line: Line) -> Found:
    compared = f"{'at most' if line['reached'] else 'NOT'} {line['target']}, {brief(line['command_s'])} with all around the steps"
    return [(f"{line['recipe']}, {line['steps']} steps, {brief(line['steps_s'])}", f"{line['val_bpb']:.4f}", "BPB", compared)]


def _peers(line: Line) -> Found:
    setting = f"d{line['depth']} {line['precision']}, compiled, {line['batch']} x {line['seq_len']:,}"
    return [
        (f"{setting}, against {peer}", f"{times:.2f}", "times", f"{short(line['tok_per_sec'][peer])} tokens/s of its own")
        for peer, times in line["times"].items()
    ]


def _variants(line: Line) -> Found:
    if not line["variant"]:
        mode = [line["precision"], *["compiled"] * line["compile"], line["optimizer"]]
        return [(f"d{line['depth']} {' '.join(mode)}, {line['batch']} x {line['seq_len']:,}", short(line["step_ms"]), "ms")]
    low, high = line["quartiles"]
    return [(line["variant"], f"{line['times']:.2f}", "times", f"half of {line['rounds']} rounds within {low:.2f} and {high:.2f}")]


def _busy(line: Line) -> Found:
    if "load" not in line:  # of one process
        return [(work, short(line[work]), "tokens/s", line["waiting"] or "") for work in ("training", "validating", "sampling")]
    found = []
    for work in ("training", "validating", "sampling"):
        mode, rate = next(iter(line[work].items()))
        others = [f"{other} {short(value)}" for other, value in line[work].items() if other != mode]
        share = [f"{line['of_better'][work]:.2f} of the better"] if work in line["of_better"] else []
        setting = f"{work}, {line['load']} busy processes on {line['cores']} cores, {mode}"
        found.append((setting, short(rate), "tokens/s", ", ".join([*others, *share])))
    return found


_ROWS: dict[str, Callable[[Line], Found]] = {
    "matmul": _matmul,
    "step": _step,
    "memory": _memory,
    "loader": _loader,
    "checkpoint": _checkpoint,
    "signal": _signal,
    "sampling": _sampling,
    "startup": _startup,
    "time_to_bpb": _time_to_bpb,
    "corpus_start": _corpus_start,
    "corpus_ranks": _corpus_ranks,
    "core": _core,
    "peers": _peers,
    "variants": _variants,
    "busy": _busy,
}
