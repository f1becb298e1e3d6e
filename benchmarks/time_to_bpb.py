"""Time to a given BPB. The code is `picotrain.bench.time_to_bpb`; see --help."""

from picotrain.bench import script

if __name__ == "__main__":
    raise SystemExit(script("time_to_bpb"))
