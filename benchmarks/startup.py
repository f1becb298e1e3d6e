"""From the command to the first completed step. The code is `picotrain.bench.startup`; see --help."""

from picotrain.bench import script

if __name__ == "__main__":
    raise SystemExit(script("startup"))
