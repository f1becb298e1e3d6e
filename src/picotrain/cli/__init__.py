"""The `picotrain` command: parse, import what the command needs, call, turn a user's mistake into one message.

Nothing heavy is imported at the top: `picotrain --help` has to answer at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from picotrain import hardware, ranks, terminal
from picotrain.cli import usage
from picotrain.cli.about import EPILOG
from picotrain.cli.usage import App
from picotrain.errors import PicotrainError, Problem, Stopped, UsageError
from picotrain.terminal import say as say

app = App(
    name="picotrain",
    context_settings={"max_content_width": 120},
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=EPILOG,
    help="Pretrain a small language model from one resolved config.\n\n"
    "`picotrain train` trains the default model on your machine's own Python library, "
    "`picotrain train model=d20 hardware=8xh100` on a rented node; `picotrain plan ...` tells what either would mean.",
)
data_app = App(help="Prepare and look at corpora.")
tokenizer_app = App(help="Train and look at tokenizers.")


def _print_version(asked: bool) -> None:
    if asked:
        from picotrain import __version__, checkout

        source = checkout.state()
        print(f"picotrain {__version__}" + (f" ({source})" if source else ""))
        raise typer.Exit


app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")


@app.callback()
def _everywhere(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and the commit of a checkout.")
    ] = False,
) -> None: ...


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="OVERRIDE", show_default=False, help="Group choices (model=d6) and keys (train.max_steps=100); the last of a key wins."
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="Take everything but run.* from a saved config.yaml; dotted overrides may follow.")
]
ConfigDir = Annotated[Path | None, typer.Option("--config-dir", help="A folder with groups of your own (model/mine.yaml), searched too.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Checkpoint = Annotated[str, typer.Option("--checkpoint", help="last, best or a step.")]


@app.command(epilog=EPILOG)
def train(overrides: Overrides = None, config: ConfigFile = None, config_dir: ConfigDir = None) -> None:
    """Train, or go on where the same experiment stopped.

    \b
    Examples:
      picotrain train                                on Python's own library
      picotrain train model=d2 train.max_steps=20    a try of seconds
      picotrain train data=files data.path=docs/     your own text
    """
    from picotrain.cli import commands
    from picotrain.launch import launch

    raise typer.Exit(launch(lambda: commands.new_run(overrides or [], config, config_dir)))


@app.command()
def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or the URL of its archive.")], overrides: Overrides = None
) -> None:
    """Go on with a run, with changed values if wanted.

    \b
    Examples:
      picotrain resume runs/mine
      picotrain resume runs/mine train.max_steps=2000
      picotrain resume s3://bucket/mine    fetched first, into runs/mine

    Cadence, logging and paths may change freely; hardware and micro-batch change only the rounding; horizon and rates are
    announced as a changed experiment; the rest is refused.
    """
    from picotrain.cli import commands
    from picotrain.launch import launch

    raise typer.Exit(launch(lambda: commands.resumed(run, overrides or [])))


@app.command()
def plan(
    overrides: Overrides = None,
    config: ConfigFile = None,
    config_dir: ConfigDir = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Print what a config means: batch, steps, memory, time.

    \b
    Examples:
      picotrain plan model=d20 hardware=8xh100
      picotrain plan model=d6 train.max_steps=500 --json

    Nothing is run, downloaded or written. Time is said where the hardware is known or was measured.
    """
    from picotrain.cli import commands

    commands.show_plan(overrides or [], config, config_dir, json)


@app.command("config")
def config_(overrides: Overrides = None, config: ConfigFile = None, config_dir: ConfigDir = None) -> None:
    """Print every key with the value that it would have.

    \b
    Examples:
      picotrain config
      picotrain config model=d6 train.seq_len=1024 > mine.yaml

    It is the YAML that `picotrain train` with the same words writes into the run directory, and `--config` reads.
    """
    from picotrain.cli import commands

    commands.show_config(overrides or [], config, config_dir)


@app.command("eval")
def eval_(
    run: RunDir,
    checkpoint: Checkpoint = "last",
    bundle: Annotated[str | None, typer.Option("--bundle", help="Folder of an evaluation bundle; default: the run's own.")] = None,
    baseline_table: Annotated[
        str | None, typer.Option("--baseline-table", help="File in the bundle with the random baselines; default: the run's.")
    ] = None,
    max_per_task: Annotated[
        int | None, typer.Option("--max-per-task", min=0, help="Examples of each CORE task; 0: all; default: as in the run.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="Measure about so many tokens of each text; default: the whole validation shard.")
    ] = None,
    hf: Annotated[Path | None, typer.Option("--hf", help="Measure this Hugging Face model on the run's text instead.")] = None,
) -> None:
    """Measure a checkpoint: bits per byte, CORE, samples.

    \b
    Examples:
      picotrain eval runs/mine
      picotrain eval runs/mine --tokens 200000         a quick look
      picotrain eval runs/mine --checkpoint best --bundle eval_bundle
      picotrain eval runs/mine --hf models/gpt2
      torchrun --nproc_per_node 8 -m picotrain eval runs/mine

    Results go to RUN/eval as JSON, CSV and Markdown. What is measured is kept where a later part fails; tasks that an
    interrupted evaluation has finished are not evaluated again.
    """
    from picotrain.cli import commands

    options = {"bundle": bundle, "baseline_table": baseline_table, "max_per_task": max_per_task, "tokens": tokens}
    raise typer.Exit(commands.evaluate(run, checkpoint, hf, **options))


@app.command("compare")
def compare_(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="RUN, RUN@best, RUN@STEP, RUN/checkpoints/step_..., or a Hugging Face folder.")
    ],
    html: Annotated[Path | None, typer.Option("--html", help="Write it as one self-contained page, too.")] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="CORE tasks; default: evaluation.core.bundle of the first's config.")
    ] = None,
    max_per_task: Annotated[
        int | None, typer.Option(min=0, help="CORE examples of a task; default: as in the first's config, 0: all.")
    ] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="Validation documents, spread evenly; default: all.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say whether models differ by more than the noise.

    \b
    Examples:
      picotrain compare runs/a runs/b
      picotrain compare runs/a runs/b@best --bundle eval_bundle --html ab.html

    The first is the baseline, every other one is compared with it: bits per byte of whole documents of its validation shard,
    so that tokenizers and contexts may differ; CORE task by task; what differs in config, data and speed; samples side by
    side; and warnings where the comparison is not fair.
    """
    from picotrain.cli import compare

    raise typer.Exit(compare.compare(models, html, bundle, max_per_task, documents, json))


@app.command()
def sample(
    run: RunDir,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue; none: start a document.")] = "",
    checkpoint: Checkpoint = "last",
    max_tokens: Annotated[int, typer.Option(min=1, max=2**24, help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=1e6, help="0 takes the likeliest token every time.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, max=2**24, help="Choose among the k likeliest; 0: among all.")] = 50,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same text.")] = 0,
) -> None:
    """Continue a prompt with a run's model, as it writes.

    \b
    Examples:
      picotrain sample runs/mine "def main():"
      picotrain sample runs/mine --checkpoint best --temperature 0 --max-tokens 50
    """
    from picotrain.cli import commands

    commands.sample(run, prompt, checkpoint, max_tokens, temperature, top_k or None, seed)


@app.command()
def report(run: RunDir) -> None:
    """Write the report of a run again, finished or not.

    \b
    Example:
      picotrain report runs/mine

    It writes report.html, report.md, summary.json and the pictures, and prints the summary.
    """
    from picotrain.cli import commands

    commands.report(run)


@app.command("doctor")
def doctor_(overrides: Overrides = None, config: ConfigFile = None, config_dir: ConfigDir = None) -> None:
    """Try what a config needs before you pay for it.

    \b
    Examples:
      picotrain doctor model=d6
      picotrain doctor runs/mine      verifies all checkpoints of a run

    Devices, precision, disk, data, tokenizer, and two steps of the real config; it says what to fix, and then exits with 2.
    """
    from picotrain.cli.doctor import run

    raise typer.Exit(run(overrides or [], config, config_dir))


@app.command("bench", context_settings={"ignore_unknown_options": True}, add_help_option=False)
def bench_(
    ctx: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Benchmarks, or one and options of its own.")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="The whole set, with more settings and repeats of each; many times as long.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda; auto: an NVIDIA GPU where there is one.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON lines: versions and hardware, then one a setting.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write all of it as one JSON file, too.")] = None,
) -> None:
    """Measure how fast this machine trains, in two minutes.

    \b
    Examples:
      picotrain bench
      picotrain bench --full --out results.json
      picotrain bench step --depth 4 6 --compile
      picotrain bench loader --path corpora/mine

    Benchmarks: matmul, step, loader, startup; those named run as in the set, with the options that follow a single name
    (`picotrain bench step --help` lists them). It needs no network. A checkout has more of them: `python benchmarks/NAME.py`.
    """
    if names and names[0] in ("--help", "-h"):  # after a name it asks for the options of that one
        print(ctx.get_help())
        raise typer.Exit
    from picotrain.cli import bench

    raise typer.Exit(bench.bench(names or [], full, device, json, out))


@data_app.command("show")
def data_show(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Prepare a config's corpus if need be; print its sizes.

    \b
    Examples:
      picotrain data show data=pystdlib
      picotrain data show data=files data.path=docs/
    """
    from picotrain.cli import commands

    commands.data_show(overrides or [], config_dir)


CorpusFolder = Annotated[str, typer.Argument(metavar="CORPUS", help="A folder of Parquet shards.")]


@data_app.command("prepare")
def data_prepare(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT", help="Files, folders (searched) and globs.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the order; validation documents stay the same.")] = 0,
    min_chars: Annotated[int, typer.Option(min=0, help="Leave out documents of fewer characters.")] = 0,
    keep_duplicates: Annotated[bool, typer.Option("--keep-duplicates", help="Do not leave out exact copies.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core from 64 MB of text.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Make the first thing that cannot be used an error.")] = False,
) -> None:
    """Make a corpus of text files, JSON lines, CSV, Parquet.

    \b
    Examples:
      picotrain data prepare docs/ 'web/*.jsonl.zst' --out corpora/mine
      picotrain train data=files data.path=corpora/mine      what it is for

    Text, Markdown and source code are documents as they are, .gz and .zst too. JSON lines need a field `text`, CSV and
    Parquet files a column `text`. Documents are shuffled and exact copies left out; about 5 % validate, in the last shard.
    What cannot be used is skipped and listed, with the reason, in DIR/skipped.jsonl. After an interruption the same command
    goes on where it was.
    """
    from picotrain.cli import data

    code = data.prepare(inputs, out, seed=seed, min_chars=min_chars, keep_duplicates=keep_duplicates, workers=workers, strict=strict)
    raise typer.Exit(code)


@data_app.command("inspect")
def data_inspect(
    corpus: CorpusFolder,
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="A tokenizer.json, or its folder, to count tokens with.")] = None,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Read about so much text, spread evenly; default: all.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Documents to show the beginning of.")] = 3,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Which documents are shown.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print what is in a corpus: sizes, doubles, samples.

    \b
    Examples:
      picotrain data inspect corpora/mine
      picotrain data inspect corpora/mine --tokenizer runs/mine/tokenizer.json

    Lengths, exact duplicates, text of special tokens, invalid UTF-8, and the beginnings of a few documents.
    """
    from picotrain.cli import data

    data.inspect(corpus, tokenizer, max_bytes, samples, seed, json)


@data_app.command("verify")
def data_verify(corpus: CorpusFolder) -> None:
    """Read every shard wholly and say which are bad.

    \b
    Example:
      picotrain data verify corpora/mine      after copying it to another disk

    Each is compared with what is known of it; all bad ones are listed at once, and the exit code is 2.
    """
    from picotrain.cli import data

    raise typer.Exit(data.verify(corpus))


@data_app.command("download")
def data_download(
    corpus: Annotated[str, typer.Argument(metavar="NAME", help="climbmix, fineweb_edu, or a choice of your own.")],
    overrides: Overrides = None,
    shards: Annotated[int | None, typer.Option(min=1, help="Training shards to fetch; default: what a run of these words needs.")] = None,
    config_dir: ConfigDir = None,
) -> None:
    """Fetch shards of a data set into the cache.

    \b
    Examples:
      picotrain data download climbmix model=d20
      picotrain train data=climbmix model=d20                what it is for
      picotrain data download climbmix --shards 170

    They come from the Hugging Face Hub; what was interrupted goes on. The validation shard comes too. $PICOTRAIN_CACHE
    names the cache folder, $HF_ENDPOINT a mirror of the Hub.
    """
    from picotrain.cli import data

    data.download(corpus, overrides or [], shards, config_dir)


@tokenizer_app.command("train")
def tokenizer_train(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Train a config's tokenizer, if it is not in the cache.

    \b
    Example:
      picotrain tokenizer train data=pystdlib tokenizer.vocab_size=4096

    Prints where it is and how well it compresses, as JSON; `picotrain train` with the same keys takes it from there.
    """
    from picotrain.cli import commands

    commands.tokenizer_train(overrides or [], config_dir)


@tokenizer_app.command("eval")
def tokenizer_eval(
    overrides: Overrides = None,
    path: Annotated[Path | None, typer.Option("--path", help="A tokenizer.json, or its folder, instead of the config's tokenizer.")] = None,
    config_dir: ConfigDir = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure how well a tokenizer compresses.

    \b
    Examples:
      picotrain tokenizer eval data=pystdlib tokenizer.vocab_size=4096
      picotrain tokenizer eval --path runs/mine/tokenizer.json data=pystdlib

    Bytes per token on validation text, code, languages and scripts. GPT-2's and o200k's figures stand beside it where
    tiktoken has them on this machine; corpus and tokenizer are prepared if need be. Every text is decoded again; the exit
    code is 2 when one does not come back as it was.
    """
    from picotrain.cli import tokenizer

    raise typer.Exit(tokenizer.evaluate_tokenizer(overrides or [], path, config_dir, json))


@app.command("completion")
def completion_(shell: Annotated[str, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")]) -> None:
    """Print a script that makes a shell complete our words.

    \b
    Examples:
      eval "$(picotrain completion bash)"         in ~/.bashrc
      eval "$(picotrain completion zsh)"          in ~/.zshrc, after compinit
      picotrain completion fish | source          in ~/.config/fish/config.fish

    It completes commands, options, groups, their choices, keys, the words a key may hold, runs and files.
    """
    from picotrain.cli.shells import SHELLS, script

    if shell not in SHELLS:
        raise UsageError([Problem(shell, "there is no completion for this shell", ", ".join(SHELLS))])
    print(script(shell))


@app.command("__complete", hidden=True, context_settings={"ignore_unknown_options": True})
def complete_(shell: str, line: str, replaced: str) -> None:
    """What a shell may insert, a line each; called by the completion scripts with the line up to the cursor."""
    from picotrain.cli.completion import reply

    for word in reply(shell, line, replaced):
        print(word)


TOGETHER = ("train", "resume", "eval")  # what ranks do together; all else rank 0 does alone


def main() -> None:
    """Entry point. A user's mistake ends in one message and its exit code; a bug keeps its traceback."""
    terminal.set_up()
    hardware.wait_briefly()
    code: int | str | None = 0
    try:
        command = sys.argv[1] if len(sys.argv) > 1 else ""
        if command != "__complete" and ranks.settle().rank > 0:  # that one is a shell's, with whatever is in its environment
            if command not in TOGETHER or "--help" in sys.argv:
                return
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (rank 0 says what is wrong with the command line; `as_rank` ends it)
        with usage.in_our_words():
            code = app(prog_name="picotrain", standalone_mode=False)
            code = code if isinstance(code, int) else 0
    except Stopped as stopped:
        say(f"picotrain: {stopped}")
        os._exit(stopped.exit_code)  # without waiting for threads that still download
    except PicotrainError as error:
        say(f"error: {error}")
        code = error.exit_code
    except SystemExit as ended:
        code = ended.code
    terminal.flush()
    sys.exit(code if isinstance(code, str) else ranks.leave(code or 0))
