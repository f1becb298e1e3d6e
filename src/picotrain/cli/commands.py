"""What the commands do. Each imports what it needs: a plan must not wait for torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picotrain import plan as planning
from picotrain import run as runs
from picotrain.cli import say
from picotrain.config import Config, compose, dump
from picotrain.config.compose import data_preset
from picotrain.data import sources
from picotrain.data.remote import is_url

if TYPE_CHECKING:
    from picotrain.data.mixture import Mixture
    from picotrain.model import GPT


def resolved(overrides: Sequence[str], config_file: Path | None, config_dir: Path | None) -> Config:
    """Compose, decide every auto, and name the run's places."""
    config = compose(overrides, config_dir=config_dir, config_file=config_file)
    if config.data.kind == "auto":
        choice, reason = planning.choose_data(config, sources.pystdlib_text_bytes())
        say(reason)
        own = {key: value for key in ("lanes", "unit_bytes", "num_shards") if (value := getattr(config.data, key)) is not None}
        config = config.model_copy(update={"data": data_preset(choice).model_copy(update=own)})
    return runs.locate(config)


def train(overrides: Sequence[str], config_file: Path | None, config_dir: Path | None) -> int:
    """Open the run directory under its lock and launch the workers; the exit code."""
    return _start(resolved(overrides, config_file, config_dir), overrides)


def resume(place: str, overrides: Sequence[str]) -> int:
    """Go on with an existing run, or one that its archive has, its own config under a few overrides."""
    run, overrides = _fetched(place, overrides) if is_url(place) else (Path(place), overrides)
    runs.require_run(run)
    config = compose(overrides, config_file=run / "config.yaml", same_run=True)
    here = config.run.model_copy(update={"dir": str(run.absolute()), "name": run.name})
    return _start(runs.locate(config.model_copy(update={"run": here})), overrides)


def _fetched(url: str, overrides: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder that an archived run was restored into, and the overrides that are left. Its cache stays on its old machine."""
    from picotrain.checkpoint.archive import restore
    from picotrain.launch import RunLock

    chosen = [text.partition("=")[2] for text in overrides if text.startswith("run.dir=")]
    folder = Path(chosen[-1] if chosen else f"runs/{url.rstrip('/').rpartition('/')[2]}").expanduser()
    with RunLock(folder):
        restore(url, folder, say)
    rest = [text for text in overrides if not text.startswith("run.dir=")]
    return folder, ["run.cache_dir=null", *rest]


def _start(config: Config, overrides: Sequence[str]) -> int:
    from picotrain.launch import RunLock, launch
    from picotrain.worker import run as in_process

    if config.archive.url and config.train.save_every == -1:
        say("an archive is set: train.save_every=1000, so that there is something to mirror")
        config = config.model_copy(update={"train": config.train.model_copy(update={"save_every": 1000})})
    run_dir = Path(config.run.dir or "")
    if config.launch.node_rank > 0:  # node 0 prepares the shared run directory and holds its lock
        return launch(run_dir, int(config.hardware.nproc_per_node), config.launch, in_process)
    with RunLock(run_dir):
        plan = runs.open_run(config, overrides, say)
        if plan is None:
            say(f"{run_dir} is finished: `picotrain report` shows it, a larger horizon goes on, another run.name trains anew")
            return 0
        for note in plan.notes:
            say(note)
        return launch(run_dir, int(config.hardware.nproc_per_node), config.launch, in_process)


def show_plan(overrides: Sequence[str], config_file: Path | None, config_dir: Path | None, as_json: bool) -> None:
    """Print the plan as far as it is known without preparing anything."""
    config = resolved(overrides, config_file, config_dir)
    cache = runs.cache_dir(config)
    corpus = sources.known_mixture(config.data, cache)
    measured = sources.known_tokenizer(config.tokenizer, corpus, cache) if corpus else None
    plan = planning.make(config, config.run.name or "", corpus, measured["bytes_per_token"] if measured else None)
    if corpus and measured and (counted := _counted(config, plan, corpus, measured["tokenizer"], cache)) != corpus:
        plan = planning.make(config, config.run.name or "", counted, measured["bytes_per_token"])
    if as_json:
        print(plan.model_dump_json(indent=2))
        return
    from picotrain.cli.show import plan_table
    from picotrain.plan import pace

    plan_table(plan, pace.hint(plan, config))


def _counted(config: Config, plan: planning.Plan, corpus: Mixture, fingerprint: str, cache: Path) -> Mixture:
    """The corpus with the rows of an epoch, as far as an earlier start has counted them."""
    from picotrain.data import counts

    return counts.known(corpus, fingerprint, plan.seq_len, plan.unit_bytes, config.run.seed, cache)


def show_config(overrides: Sequence[str], config_file: Path | None, config_dir: Path | None) -> None:
    """Print the resolved YAML."""
    print(dump(resolved(overrides, config_file, config_dir)), end="")


def evaluate(run: Path, which: str, hf: Path | None, **options: Any) -> int:
    """Measure a checkpoint, or a Hugging Face model on the run's text; write a folder under RUN/eval."""

    def work() -> int:
        runs.require_run(run)
        from picotrain.cli.evaluate import Options, evaluate_checkpoint, evaluate_hf

        return evaluate_hf(hf, run, Options(**options)) if hf else evaluate_checkpoint(run, which, Options(**options))

    if "RANK" not in os.environ:
        return work()
    from picotrain.worker import as_rank

    return as_rank(work)


def load_model(run: Path, which: str) -> tuple[runs.Material, GPT, Path]:
    """A run's material and its model with a checkpoint's weights, verified, in evaluation mode on the run's device."""
    import torch

    from picotrain import checkpoint, hardware
    from picotrain.model import GPT, compute_dtype
    from picotrain.state import load_model_tensors
    from picotrain.worker import set_up_process

    material = runs.read_material(run)
    plan = material.plan
    here = plan.device in ("cpu", hardware.detect().device)  # a run of a GPU node can be looked at on a laptop
    device = plan.device if here else "cpu"
    set_up_process(material.config.hardware.model_copy(update={"device": device, "threads": None}))  # this machine's, shared by its ranks
    path = checkpoint.find(run / "checkpoints", which)
    checkpoint.verify(path)
    model = GPT(material.config.model, plan.vocab_size, plan.seq_len, compute_dtype(plan.precision if here else "fp32"))
    load_model_tensors(model, checkpoint.load_tensors(path, "model"))
    return material, model.to(torch.device(device)).eval(), path


def sample(run: Path, prompt: str, which: str, max_tokens: int, temperature: float, top_k: int | None, seed: int) -> None:
    """Stream a continuation to standard output."""
    from picotrain.config.schema import SamplingConfig
    from picotrain.sampling import stream_text

    runs.require_run(run)
    material, model, _ = load_model(run, which)
    options = SamplingConfig(max_tokens=max_tokens, temperature=temperature, top_k=top_k)
    sys.stdout.write(prompt)
    for piece in stream_text(model, material.tokenizer, prompt, options, seed):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def report(run: Path) -> None:
    """Write the report of a run again and print its summary."""
    from picotrain import report as reports
    from picotrain.lock import is_locked

    runs.require_run(run)
    reports.console_summary(reports.write_report(run, running=is_locked(run)))


def data_show(overrides: Sequence[str], config_dir: Path | None) -> None:
    """Prepare or fetch a corpus and print its facts."""
    from picotrain.cli.show import corpus_table

    config = resolved(overrides, None, config_dir)
    for corpus in sources.gather(config.data, runs.cache_dir(config), say).corpora:
        corpus_table(corpus, config)


def tokenizer_train(overrides: Sequence[str], config_dir: Path | None) -> None:
    """Train a config's tokenizer unless the cache has it, and print its facts as JSON."""
    config = resolved(overrides, None, config_dir)
    cache = runs.cache_dir(config)
    corpus = sources.gather(config.data, cache, say)
    path, measured = sources.obtain_tokenizer(config.tokenizer, corpus, cache, say)
    print(json.dumps({"path": str(path), **measured}, indent=2))
