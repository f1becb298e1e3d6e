"""CORE evaluation against a plain implementation. The code is `picotrain.bench.core`; see --help."""

from picotrain.bench import script

if __name__ == "__main__":
    raise SystemExit(script("core"))
