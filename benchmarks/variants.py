"""The step under changes of the config, side by side. The code is `picotrain.bench.variants`; see --help."""

from picotrain.bench import script

if __name__ == "__main__":
    raise SystemExit(script("variants"))
