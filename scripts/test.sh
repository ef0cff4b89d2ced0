#!/usr/bin/env bash
# The whole check: format, lint, types, tests. Sets up .venv first. Arguments go to pytest, such as: -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh '[dev]'

ruff format --check .
ruff check .
mypy
if [ $# -eq 0 ]; then
    set -- -m "not slow and not gpu"
fi
# One file of tests at a time on each core: starting processes is most of the work, and takes one core.
OMP_NUM_THREADS=1 python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile "$@"
