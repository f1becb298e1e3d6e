"""The matmul ceiling of a device. The code is `picotrain.bench.matmul`; see --help."""

from picotrain.bench import script

if __name__ == "__main__":
    raise SystemExit(script("matmul"))
