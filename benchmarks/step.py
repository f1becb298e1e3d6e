"""The training step alone. The code is `picotrain.bench.step`; see --help."""

from picotrain.bench import script

if __name__ == "__main__":
    raise SystemExit(script("step"))
