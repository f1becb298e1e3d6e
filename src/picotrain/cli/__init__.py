"""The `picotrain` command: parse, import what the command needs, call, turn a user's mistake into one message.

Nothing heavy is imported at the top: `picotrain --help` has to answer at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from picotrain import ranks
from picotrain.errors import PicotrainError, Problem, Stopped

app = typer.Typer(
    name="picotrain",
    no_args_is_help=True,
    context_settings={"max_content_width": 120},
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich would cost --help a third of its time
    pretty_exceptions_enable=False,
    help="Pretrain a small language model from one resolved config.\n\n"
    "`picotrain train` trains the default model on your machine's own Python library, "
    "`picotrain train model=d20 hardware=8xh100` on a rented node; `picotrain plan ...` tells what either would mean.",
)
data_app = typer.Typer(no_args_is_help=True, help="Prepare and look at corpora.")
tokenizer_app = typer.Typer(no_args_is_help=True, help="Train and look at tokenizers.")
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[OVERRIDE]...", help="Group choices (model=d6) and dotted keys (train.max_steps=100); the last of a key wins."),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="Take everything but run.* from a saved config.yaml; dotted overrides may follow.")
]
ConfigDir = Annotated[Path | None, typer.Option("--config-dir", help="A folder with groups of your own (model/mine.yaml), searched too.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Checkpoint = Annotated[str, typer.Option("--checkpoint", help="last, best or a step.")]


def say(message: str) -> None:
    """Progress and notes go to standard error: standard output belongs to results."""
    print(message, file=sys.stderr, flush=True)


@app.command()
def train(overrides: Overrides = None, config: ConfigFile = None, config_dir: ConfigDir = None) -> None:
    """Train, or go on from the newest checkpoint of the same experiment.

    Examples: `picotrain train`, `picotrain train model=d6 train.max_steps=500`, `picotrain train --config runs/a/config.yaml`.
    """
    from picotrain.cli import commands

    raise typer.Exit(commands.train(overrides or [], config, config_dir))


@app.command()
def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or the URL of its archive.")], overrides: Overrides = None
) -> None:
    """Go on with a run from its newest checkpoint, with changed values if wanted.

    From an archive (`picotrain resume s3://bucket/run`) the run is fetched first, into runs/<name> or run.dir=...

    Cadence, logging and paths may change freely; hardware and micro-batch change only the rounding; horizon and rates are
    announced as a changed experiment; the rest is refused.
    """
    from picotrain.cli import commands

    raise typer.Exit(commands.resume(run, overrides or []))


@app.command()
def plan(
    overrides: Overrides = None,
    config: ConfigFile = None,
    config_dir: ConfigDir = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Print what a config means without running it: parameters, batch, steps, memory, and time where the hardware is known."""
    from picotrain.cli import commands

    commands.show_plan(overrides or [], config, config_dir, json)


@app.command("config")
def config_(overrides: Overrides = None, config: ConfigFile = None, config_dir: ConfigDir = None) -> None:
    """Print the resolved config as YAML: what `train` would write into the run directory."""
    from picotrain.cli import commands

    commands.show_config(overrides or [], config, config_dir)


@app.command("eval")
def eval_(
    run: RunDir,
    checkpoint: Checkpoint = "last",
    bundle: Annotated[str | None, typer.Option("--bundle", help="Folder of an evaluation bundle; default: the run's own.")] = None,
    baseline_table: Annotated[str | None, typer.Option(help="File in the bundle with the random baselines; default: the run's.")] = None,
    max_per_task: Annotated[int | None, typer.Option(help="Examples of each CORE task; 0: all; default: as in the run.")] = None,
    hf: Annotated[Path | None, typer.Option("--hf", help="Measure this Hugging Face model on the run's text instead.")] = None,
) -> None:
    """Measure a checkpoint: bits per byte on validation and training text, the CORE tasks of a bundle, and samples.

    Examples: `picotrain eval runs/d20 --checkpoint best --bundle eval_bundle`,
    `torchrun --nproc_per_node 8 -m picotrain eval runs/d20`, `picotrain eval runs/d20 --hf models/gpt2`.

    Results go to RUN/eval as JSON, CSV and Markdown. Tasks that an interrupted evaluation has finished are not evaluated again.
    """
    from picotrain.cli import commands

    raise typer.Exit(commands.evaluate(run, checkpoint, hf, bundle=bundle, baseline_table=baseline_table, max_per_task=max_per_task))


@app.command("compare")
def compare_(
    models: Annotated[
        list[str], typer.Argument(metavar="A B...", help="RUN, RUN@best, RUN@STEP, RUN/checkpoints/step_..., or a Hugging Face folder.")
    ],
    html: Annotated[Path | None, typer.Option("--html", help="Write it as one self-contained page, too.")] = None,
    bundle: Annotated[Path | None, typer.Option("--bundle", help="CORE tasks; default: evaluation.core.bundle of A's config.")] = None,
    max_per_task: Annotated[int | None, typer.Option(min=0, help="CORE examples of a task; default: as A's config, 0: all.")] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="Validation documents, spread evenly; default: all.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say whether models differ by more than the noise: A is the baseline, every other one is compared with it.

    Example: `picotrain compare runs/a runs/b@best --bundle eval_bundle --html ab.html`.

    Bits per byte of whole documents of A's validation shard, so that tokenizers and contexts may differ; CORE task by task;
    what differs in config, data and speed; samples side by side; and warnings where the comparison is not fair.
    """
    from picotrain.cli import compare

    raise typer.Exit(compare.compare(models, html, bundle, max_per_task, documents, json))


@app.command()
def sample(
    run: RunDir,
    prompt: Annotated[str, typer.Argument(help="Text to continue; none: start a document.")] = "",
    checkpoint: Checkpoint = "last",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token every time.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among the k likeliest; 0: among all.")] = 50,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
) -> None:
    """Continue a prompt with a run's model, streaming."""
    from picotrain.cli import commands

    commands.sample(run, prompt, checkpoint, max_tokens, temperature, top_k or None, seed)


@app.command()
def report(run: RunDir) -> None:
    """Write report.md and summary.json of a run again, finished or not."""
    from picotrain.cli import commands

    commands.report(run)


@app.command("doctor")
def doctor_(overrides: Overrides = None, config: ConfigFile = None, config_dir: ConfigDir = None) -> None:
    """Preflight: devices, precision, disk, data, tokenizer, and two steps of the real config; says what to fix.

    With a run directory instead of overrides: verify all of its checkpoints.
    """
    from picotrain.cli.doctor import run

    raise typer.Exit(run(overrides or [], config, config_dir))


@app.command("bench", context_settings={"ignore_unknown_options": True}, add_help_option=False)
def bench_(
    ctx: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Benchmarks, or one and options of its own.")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="The whole set, with more settings and repeats of each; many times as long.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda; auto: an NVIDIA GPU where there is one.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON lines: versions and hardware, then one a setting.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write all of it as one JSON file, too.")] = None,
) -> None:
    """Measure this machine: matmul ceiling, training step, loader, checkpoint and sampling, in about two minutes.

    Examples: `picotrain bench`, `picotrain bench --full --out results.json`,
    `picotrain bench step --depth 4 6 --compile`, `picotrain bench loader --path corpora/mine`.

    Benchmarks: matmul, step, memory, loader, checkpoint, sampling, startup, time_to_bpb, corpus, core, peers, variants; those named run
    as in the set, with the options that follow a single name (`picotrain bench step --help` lists them). It needs no network.
    """
    if names and names[0] in ("--help", "-h"):  # after a name it asks for the options of that one
        print(ctx.get_help())
        raise typer.Exit
    from picotrain.cli import bench

    raise typer.Exit(bench.bench(names or [], full, device, json, out))


@data_app.command("show")
def data_show(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Prepare a corpus if need be and print what is in it, e.g. `picotrain data show data=files data.path=texts/`."""
    from picotrain.cli import commands

    commands.data_show(overrides or [], config_dir)


CorpusFolder = Annotated[str, typer.Argument(metavar="CORPUS", help="A folder of Parquet shards.")]


@data_app.command("prepare")
def data_prepare(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUTS...", help="Files, folders (searched) and globs.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    seed: Annotated[int, typer.Option(help="Of the order; validation documents stay the same.")] = 0,
    min_chars: Annotated[int, typer.Option(min=0, help="Leave out documents of fewer characters.")] = 0,
    keep_duplicates: Annotated[bool, typer.Option("--keep-duplicates", help="Do not leave out exact copies.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core from 64 MB of text.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Make the first thing that cannot be used an error.")] = False,
) -> None:
    """Make a corpus of text, Markdown, source code, JSON lines and CSV (.gz, .zst) and Parquet files.

    Example: `picotrain data prepare notes/ 'web/*.jsonl.zst' --out corpora/mine`, then
    `picotrain train data=files data.path=corpora/mine`.

    JSON lines need a field `text`, CSV and Parquet files a column `text`. Documents are shuffled and exact copies left
    out; about 5 % validate, in the last shard. What cannot be used is skipped and listed, with the reason, in
    DIR/skipped.jsonl. After an interruption the same command goes on where it was.
    """
    from picotrain.cli import data

    options = {"seed": seed, "min_chars": min_chars, "keep_duplicates": keep_duplicates, "workers": workers, "strict": strict}
    raise typer.Exit(data.prepare(inputs, out, **options))


@data_app.command("inspect")
def data_inspect(
    corpus: CorpusFolder,
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="A tokenizer.json, or its folder, to count tokens with.")] = None,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Read about so much text, spread evenly; default: all.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Documents to show the beginning of.")] = 3,
    seed: Annotated[int, typer.Option(help="Which documents are shown.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print what is in a corpus: sizes, lengths, duplicates, special-token text, invalid UTF-8, sample documents.

    Example: `picotrain data inspect corpora/mine --tokenizer tokenizer.json --max-bytes 100000000`.
    """
    from picotrain.cli import data

    data.inspect(corpus, tokenizer, max_bytes, samples, seed, json)


@data_app.command("verify")
def data_verify(corpus: CorpusFolder) -> None:
    """Read every shard wholly and compare it with what is known of it; exit code 2 when anything is bad.

    Example: `picotrain data verify corpora/mine` after copying it to another disk. All bad shards are listed at once.
    """
    from picotrain.cli import data

    raise typer.Exit(data.verify(corpus))


@data_app.command("download")
def data_download(
    corpus: Annotated[str, typer.Argument(metavar="NAME", help="climbmix, fineweb_edu, or a choice of your own.")],
    shards: Annotated[int | None, typer.Option(min=1, help="Training shards to fetch; default: as the config says.")] = None,
    config_dir: ConfigDir = None,
) -> None:
    """Fetch shards of a data set from the Hugging Face Hub into the cache; goes on where it was interrupted.

    Example: `picotrain data download climbmix --shards 170`, then `picotrain train data=climbmix data.num_shards=170`.

    The validation shard comes too. $PICOTRAIN_CACHE names the cache folder, $HF_ENDPOINT a mirror of the Hub.
    """
    from picotrain.cli import data

    data.download(corpus, shards, config_dir)


@tokenizer_app.command("train")
def tokenizer_train(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Train a config's tokenizer, if it is not in the cache, and print where it is and how well it compresses."""
    from picotrain.cli import commands

    commands.tokenizer_train(overrides or [], config_dir)


@tokenizer_app.command("eval")
def tokenizer_eval(
    overrides: Overrides = None,
    path: Annotated[Path | None, typer.Option("--path", help="A tokenizer.json, or its folder, instead of the config's tokenizer.")] = None,
    config_dir: ConfigDir = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure how well a tokenizer compresses: bytes per token on validation text, code, languages and scripts.

    Examples: `picotrain tokenizer eval data=files data.path=corpora/mine tokenizer.vocab_size=16384`,
    `picotrain tokenizer eval --path other/tokenizer.json data=climbmix`.

    GPT-2's and o200k's figures stand beside it where tiktoken has them on this machine; corpus and tokenizer are prepared
    if need be. Every text is decoded again; the exit code is 2 when one does not come back as it was.
    """
    from picotrain.cli import tokenizer

    raise typer.Exit(tokenizer.evaluate_tokenizer(overrides or [], path, config_dir, json))


@app.command()
def completion(shell: Annotated[str, typer.Argument(help="bash or zsh")]) -> None:
    """Print a completion script of groups, choices and keys: `eval "$(picotrain completion bash)"`."""
    from picotrain.config.completion import SHELLS, script
    from picotrain.errors import ConfigError

    if shell not in SHELLS:
        raise ConfigError([Problem("completion", f"no script for {shell!r}", " or ".join(SHELLS))])
    print(script(shell))


@app.command("__complete", hidden=True, context_settings={"ignore_unknown_options": True})
def complete_(words: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Completions of the last word, a line each; called by the completion scripts."""
    from picotrain.config.completion import complete

    before, current = (words[:-1], words[-1]) if words else ([], "")
    print("\n".join(complete(before, current)))


TOGETHER = ("train", "resume", "eval")  # what ranks do together; all else rank 0 does alone


def main() -> None:
    """Entry point. A user's mistake ends in one message and its exit code; a bug keeps its traceback."""
    try:
        command = sys.argv[1] if len(sys.argv) > 1 else ""
        if command != "__complete" and ranks.settle().rank > 0:  # that one is a shell's, with whatever is in its environment
            if command not in TOGETHER or "--help" in sys.argv:
                return
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (rank 0 says what is wrong with the command line; `as_rank` ends it)
        app()
    except Stopped as stopped:
        say(f"picotrain: {stopped}")
        os._exit(stopped.exit_code)  # without waiting for threads that still download
    except PicotrainError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output went away, e.g. `| head`
        sys.stderr.close()
        sys.exit(0)
