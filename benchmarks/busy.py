"""Training, validating and sampling beside busy processes. The code is `picotrain.bench.busy`; see --help."""

from picotrain.bench import script

if __name__ == "__main__":
    raise SystemExit(script("busy"))
