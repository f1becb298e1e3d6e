#!/usr/bin/env bash
# The test-suite: ./tests/run.sh [pytest argument ...]
#   ./tests/run.sh                          everything but the slow tests, under ten minutes on two cores, one process a core
#   ./tests/run.sh -n 0 ...                 in one process, for a debugger
#   ./tests/run.sh -m slow                  the slow ones (minutes each)
#   ./tests/run.sh tests/test_data.py -x    one file, up to the first failure
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh" dev
cd "$root"
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal "$@" # neighbours stay together, and so do their fixtures
