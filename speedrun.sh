#!/usr/bin/env bash
# From nothing to a trained model and its report: ./speedrun.sh [override ...]
# Sets up .venv (scripts/setup.sh says how to choose another Python, torch or index), then trains the experiment for this machine:
# `speedrun` on NVIDIA GPUs, `cpu_speedrun` elsewhere. The arguments go to `picotrain train`; an experiment=... or --config of yours
# takes the place of the preset. The run lands in ./runs of the folder you are in.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bash "$root/scripts/setup.sh"

preset=experiment=cpu_speedrun
if [[ "$(nvidia-smi -L 2>/dev/null || true)" == GPU* ]]; then preset=experiment=speedrun; fi
for argument in "$@"; do
  case "$argument" in experiment=* | --config | --config=*) preset= ;; esac
done
exec "$root/.venv/bin/picotrain" train ${preset:+"$preset"} "$@"
