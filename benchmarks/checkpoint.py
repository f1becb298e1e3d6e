"""How long a save holds the loop, and a signal takes to a whole checkpoint. The code is `picotrain.bench.checkpoint`; see --help."""

from picotrain.bench import script

if __name__ == "__main__":
    raise SystemExit(script("checkpoint"))
