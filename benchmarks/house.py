"""The size of the house: what docs/design.md promises of it, measured. Takes a four-step run on a CPU, some seconds.

    python benchmarks/house.py

src_lines: all lines of Python in the package. test_lines: all of tests/. run_lines, run_modules: those of the package's that a run of
four steps imports, with data=files. frames: the package's, from the command to the loop. files_naming: in how many files of the package
a part's name stands, which is about how many know of it. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from picotrain.bench import script

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "src" / "picotrain"
NAMES = {"GPT": r"\bGPT\b", "muon": r"\bmuon\b", "wandb": r"\bwandb\b"}
WORDS = (
    "data=files model=d2 model.width=64 model.head_dim=32 hardware=cpu hardware.compile=false train.seq_len=32 train.total_batch_size=256 "
    "train.max_steps=4 tokenizer.vocab_size=300"
)
RUN = """
import json, sys, traceback
from pathlib import Path
import picotrain.loop
package, frames, train = Path(picotrain.__file__).parent, [], picotrain.loop.train

def watched(*args, **kwargs):
    frames.extend(frame for frame in traceback.extract_stack()[:-1] if Path(frame.filename).is_relative_to(package))
    return train(*args, **kwargs)

picotrain.loop.train = watched
from picotrain.cli import main
code = 0
try:
    main()
except SystemExit as ended:
    code = ended.code
files = {module.__file__ for module in sys.modules.values() if getattr(module, "__file__", None)}
ours = [path for path in map(Path, files) if path.suffix == ".py" and path.is_relative_to(package)]
lines = sum(len(path.read_text().splitlines()) for path in ours)
names = [f"{Path(frame.filename).relative_to(package)}:{frame.name}" for frame in frames]
print(json.dumps({"code": code, "run_lines": lines, "run_modules": len(ours), "frames": len(names), "frames_are": names}))
"""


def lines_in(folder: Path) -> int:
    """All lines of Python below a folder."""
    return sum(len(path.read_text().splitlines()) for path in folder.rglob("*.py"))


def run_of_four_steps() -> dict[str, object]:
    """What such a run imports, and how deep its loop lies."""
    with tempfile.TemporaryDirectory() as place:
        (text := Path(place) / "text.txt").write_text("\n\n".join(f"Number {n} of many: its square is {n * n}." for n in range(20_000)))
        words = [*WORDS.split(), f"data.path={text}", f"run.dir={place}/run", f"run.cache_dir={place}/cache"]
        done = subprocess.run([sys.executable, "-c", RUN, "train", *words], capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    if done.returncode or found.pop("code"):
        raise SystemExit(done.stdout + done.stderr)
    return found


def arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # there is nothing to choose


def run(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    texts = [path.read_text() for path in PACKAGE.rglob("*.py")]
    naming = {name: sum(bool(re.search(pattern, text)) for text in texts) for name, pattern in NAMES.items()}
    sizes = {"src_lines": lines_in(PACKAGE), "test_lines": lines_in(REPO / "tests"), "files_naming": naming}
    yield {"benchmark": "house", **sizes, **run_of_four_steps()}


if __name__ == "__main__":
    raise SystemExit(script(__file__))
