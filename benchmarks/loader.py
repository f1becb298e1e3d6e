"""The data stream, from zstd Parquet to ready batches. The code is `picotrain.bench.loader`; see --help."""

from picotrain.bench import script

if __name__ == "__main__":
    raise SystemExit(script("loader"))
