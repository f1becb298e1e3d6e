"""Every command that README and docs show is typed as it stands there, in bash, in an empty home; only made small by what is appended.

A page shows commands in blocks fenced with ```sh. A block is one script: it stops at the first command that fails. Programs on PATH are
stand-ins that call the real ones with `SMALL` behind the words of the page: a model of two layers, three steps, a little text.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pytest
from conftest import picotrain, write_corpus
from test_bundle import write_bundle
from test_sources import Hub

REPO = Path(__file__).parent.parent
HISTORY = {"log.md"}  # a lab notebook: what was typed then
QUICK = {"README.md", "runs.md", "code.md"}  # the other pages' commands take minutes together

MODEL = "model.depth=2 model.width=64 model.head_dim=32 train.seq_len=32 train.total_batch_size=256 train.device_batch_size=auto"
STEPS = "train.max_steps=3 train.eval_every=2 train.eval_tokens=2048 sampling.max_tokens=4 schedule.warmup_steps=0"
HERE = "hardware.device=cpu hardware.nproc_per_node=1 hardware.threads=1 hardware.compile=false train.precision=fp32"
TEXT = "tokenizer.vocab_size=300 tokenizer.train_bytes=200000"
SMALL = {  # what follows the words of a page, by the command's first word
    "train": [*MODEL.split(), *STEPS.split(), *HERE.split(), *TEXT.split()],
    "doctor": [*MODEL.split(), *STEPS.split(), *HERE.split(), *TEXT.split()],
    "resume": ["train.max_steps=50", "train.eval_tokens=2048"],
    "eval": ["--tokens", "4096"],
    "compare": ["--documents", "12"],
    "tokenizer": TEXT.split(),
}
# Where the text or the time is not to be had here: a page's URL is read from a folder, two shards stand for a corpus, and of a benchmark
# that takes minutes the help is asked for (of those in benchmarks/, too: test_bench.py parses the options that pages show).
SPECIAL = """
case " $* " in *" data.path="*://*) set -- "$@" data.path=corpora/mine ;; esac
case " $* " in *" data=climbmix "*) test "$1" = train && set -- "$@" data.num_shards=2 ;; esac
case "$1 $2" in
  "data download") set -- "$@" --shards 2 ;;
  "bench "|"bench --full") set -- bench matmul ;;
  "bench "*) set -- bench "$2" --help ;;
esac
"""


class Block(NamedTuple):
    """Commands of a page that belong together."""

    page: Path
    line: int  # of the page, where it begins
    text: str

    @property
    def id(self) -> str:
        return f"{self.page.name}:{self.line}"


def pages() -> list[Path]:
    return [REPO / "README.md", *(page for page in sorted((REPO / "docs").glob("*.md")) if page.name not in HISTORY)]


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text("utf-8")
    for match in re.finditer(r"(?ms)^```sh\n(.*?)^```", text):
        yield Block(page, text.count("\n", 0, match.start()) + 2, match[1])


def is_quick(block: Block) -> bool:
    return block.page.name in QUICK and "torchrun" not in block.text  # README's second block of everyday use: a minute by itself


def marked(block: Block) -> object:
    return pytest.param(block, id=block.id, marks=() if is_quick(block) else pytest.mark.slow)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty home with the texts that the pages name, and stand-ins that make what is typed small."""
    root = tmp_path_factory.mktemp("home")
    write_corpus(root / "corpora" / "mine", documents=900)
    for folder, name in (("texts", "a.txt"), ("notes", "b.md")):
        (root / folder).mkdir()
        (root / folder / name).write_text("\n\n".join(f"{folder}, number {n}: a sentence about {n * n}." for n in range(20_000)))
    (root / "web").mkdir()
    lines = "".join(f'{{"text": "page {n} says that {n} and {n + 1} are {2 * n + 1}, {"again " * (n % 7)}"}}\n' for n in range(20_000))
    with pa.CompressedOutputStream(str(root / "web" / "a.jsonl.zst"), "zstd") as file:
        file.write(lines.encode())
    programs = root / "programs"
    programs.mkdir()
    python = shlex.quote(sys.executable)
    cases = "\n".join(f'  {word}) exec {python} -m picotrain "$@" {shlex.join(more)} ;;' for word, more in SMALL.items())
    epoch = shlex.join(word for word in SMALL["train"] if not word.startswith("train.max_steps"))  # one horizon at a time
    whole = f'case "$*" in *num_train_epochs*) exec {python} -m picotrain "$@" data.path=corpora/mine {epoch} ;; esac\n'
    stand_in(programs / "picotrain", SPECIAL + whole + f'case "$1" in\n{cases}\n  *) exec {python} -m picotrain "$@" ;;\nesac')
    train = shlex.join(word for word in SMALL["train"] if not word.startswith("hardware.nproc_per_node"))
    by_word = "".join(f'*" {word} "*) set -- "$@" {shlex.join(SMALL[word])} ;; ' for word in ("resume", "eval"))
    stand_in(programs / "torchrun", f'case " $* " in *" train "*) set -- "$@" {train} ;; {by_word}esac\n'
             f'exec {python} -m torch.distributed.run "$@"')  # fmt: skip
    minimal = f'case "$*" in *picotrain.minimal*) set -- "$@" {train} ;; esac'
    benchmark = f'case "$1" in benchmarks/*.py) set -- {shlex.quote(str(REPO))}/"$1" --help ;; esac'
    stand_in(programs / "python", f'{minimal}\n{benchmark}\nexec {python} "$@"')
    stand_in(programs / "pip", EXTRAS.format(python=python, project=shlex.quote(str(REPO / "pyproject.toml"))))
    stand_in(programs / "git", CLONE.format(repo=shlex.quote(str(REPO)), venv=shlex.quote(sys.prefix), small=shlex.join(SMALL["train"])))
    return root


# A clone costs a set-up of minutes, which CI does before these tests: this one has the environment that they run in.
CLONE = """
test "$1 $2" = "clone URL"
mkdir "$3"
ln -s {repo}/* "$3"
ln -s {venv} "$3/.venv"
rm "$3/speedrun.sh"
printf '#!/bin/bash\\nexec .venv/bin/python -m picotrain train experiment=cpu_speedrun "$@" {small}\\n' > "$3/speedrun.sh"
chmod +x "$3/speedrun.sh"
"""

# Extras are looked up and not installed.
EXTRAS = """
exec {python} - "$@" <<'END'
import re, sys, tomllib
known = tomllib.load(open({project!r}, "rb"))["project"]["optional-dependencies"]
(extra,) = re.fullmatch(r"install -e [.][[](\\w+)[]]", " ".join(sys.argv[1:])).groups()
known[extra]
END
"""


@pytest.fixture(scope="module")
def made(home: Path) -> Path:
    """A run, a bundle, a tokenizer and a model of somebody else, as the pages name them."""
    transformers = pytest.importorskip("transformers")
    words = ["data=files", f"data.path={home / 'corpora' / 'mine'}", f"run.dir={home / 'trained'}", f"run.cache_dir={home / 'cache'}"]
    done = picotrain("train", "model=d2", *words, *SMALL["train"])
    assert done.returncode == 0, done.stderr
    shutil.copy(home / "trained" / "tokenizer.json", home)
    write_bundle(home / "eval_bundle")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32, vocab_size=300)
    transformers.GPT2LMHeadModel(config).save_pretrained(home / "models" / "gpt2")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(home / "tokenizer.json"), bos_token="<|bos|>")
    tokenizer.save_pretrained(home / "models" / "gpt2")
    return home


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Hub on the loopback that has three shards of climbmix."""
    root = tmp_path_factory.mktemp("hub")
    for name, shard in zip((0, 1, 6542), sorted(write_corpus(root / "made").iterdir()), strict=True):
        shard.rename(root / f"shard_{name:05d}.parquet")
    handler = type("Handler", (Hub,), {"root": root, "repo": "karpathy/climbmix-400b-shuffle", "requests": [], "break_once": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def stand_in(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/bash\nset -e\n{script}\n")
    path.chmod(0o755)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("block", [marked(block) for page in pages() for block in blocks(page)])
def test_what_a_page_shows_can_be_typed(block: Block, home: Path, tmp_path: Path, request: pytest.FixtureRequest):
    environment = {
        "HOME": str(home), "PATH": f"{home / 'programs'}:/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": str(REPO / "src"),
        "PICOTRAIN_CACHE": str(home / "cache"), "OMP_WAIT_POLICY": "passive", "TERM": "dumb", "LANG": "C.UTF-8",
    }  # fmt: skip
    for name in ("texts", "notes", "web"):
        shutil.copytree(home / name, tmp_path / name)
    for name in ("mine", "books"):
        if f"--out corpora/{name}" not in block.text:
            shutil.copytree(home / "corpora" / "mine", tmp_path / "corpora" / name)
    if not is_quick(block):
        made = request.getfixturevalue("made")
        environment |= {"HF_ENDPOINT": request.getfixturevalue("hub"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        shutil.copy(made / "tokenizer.json", tmp_path)
        for name in ("eval_bundle", "models"):
            shutil.copytree(made / name, tmp_path / name)
        for name in set(re.findall(r"runs/([\w-]+)", block.text)) - set(re.findall(r"run\.name=([\w-]+)", block.text)):
            shutil.copytree(made / "trained", tmp_path / "runs" / name)
    script = f"set -E\ntrap 'echo \"FAILED: $BASH_COMMAND\" >&2; exit 1' ERR\n{block.text}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=590
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "Traceback" not in done.stdout, done.stdout[-6000:]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_commands_stand_in_blocks_that_are_run(page: Path):
    """Each fence says what it holds, and no command hides in an indented line, which no test would type."""
    fences = re.findall(r"(?m)^```(\w*)$", page.read_text("utf-8"))
    assert set(fences[::2]) <= {"sh", "text", "python", "yaml", "toml", "json"} and not any(fences[1::2])
    hidden = re.findall(
        r"(?m)^ {4,}(?:\$ )?(?:picotrain|torchrun|python|pip|\./speedrun\.sh|\./tests/run\.sh) .*$", page.read_text("utf-8")
    )
    assert not hidden


def test_the_first_page_is_short():
    assert len((REPO / "README.md").read_text("utf-8").splitlines()) <= 130


def test_links_between_pages_lead_somewhere():
    for page in [*pages(), REPO / "docs" / "log.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
