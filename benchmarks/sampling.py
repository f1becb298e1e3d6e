"""Tokens per second of sampling. The code is `picotrain.bench.sampling`; see --help."""

from picotrain.bench import script

if __name__ == "__main__":
    raise SystemExit(script("sampling"))
