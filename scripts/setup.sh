#!/usr/bin/env bash
# Make or refresh this checkout's .venv, the only set-up there is: scripts/setup.sh [extra ...]   (extras of pyproject.toml, such as dev)
# speedrun.sh and tests/run.sh call it. It needs Python 3.11 or newer with venv, and a package index that pip can reach.
#
# Every install keeps to constraints.txt. Environment variables change what is installed (remembered in .venv until named anew):
#   PICOTRAIN_PYTHON     the interpreter to make .venv with; default: the first of python3, python3.13, python3.12, python3.11 that will do
#   PICOTRAIN_TORCH      another torch than that of constraints.txt, as a requirement: PICOTRAIN_TORCH="torch==2.11.0"
#   PICOTRAIN_INDEX_URL  one more package index, for another build of torch: PICOTRAIN_INDEX_URL=https://download.pytorch.org/whl/cu126
# pip's own variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...) work as always.
# With none of them, Linux gets PyTorch's build for the CUDA version of its NVIDIA driver, or for a CPU without one, where PyTorch's index
# can be reached, and everything else the build on the package index (Linux: CUDA; macOS: CPU and MPS).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
candidates=(python3 python3.13 python3.12 python3.11)
if [ -n "${PICOTRAIN_PYTHON:-}" ]; then candidates=("$PICOTRAIN_PYTHON"); fi

# Whether it runs is asked of each one: a name on PATH may be a shim for nothing, and Debian ships Python without ensurepip.
for python in "${candidates[@]}"; do
  if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
    exec "$python" "$here/make_venv.py" "$@"
  fi
done
echo "set-up: no Python 3.11 or newer with venv and ensurepip among: ${candidates[*]}." >&2
echo "set-up: install one (Debian, Ubuntu: apt install python3-venv) or name it: PICOTRAIN_PYTHON=/path/to/python3.12" >&2
exit 2
