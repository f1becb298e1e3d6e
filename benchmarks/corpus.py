"""A corpus of thousands of shards: starts, and what many ranks would read. The code is `picotrain.bench.corpus`; see --help."""

from picotrain.bench import script

if __name__ == "__main__":
    raise SystemExit(script("corpus"))
