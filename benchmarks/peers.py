"""The training step beside peers' architectures. The code is `picotrain.bench.peers`; see --help."""

from picotrain.bench import script

if __name__ == "__main__":
    raise SystemExit(script("peers"))
