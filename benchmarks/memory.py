"""Peak memory of training, predicted and measured. The code is `picotrain.bench.memory`; see --help."""

from picotrain.bench import script

if __name__ == "__main__":
    raise SystemExit(script("memory"))
