#!/usr/bin/env bash
# Check format, lint, spelling and types, then run the tests. Sets up .venv first. Arguments go to pytest:
#   bash scripts/test.sh tests/models
#   bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh '[dev]'

ruff format --check .
ruff check .
codespell
mypy
if [ $# -eq 0 ]; then
    set -- -m "not slow and not gpu"
fi
# One test file per core at a time, in the order of tests/conftest.py.
OMP_NUM_THREADS=1 python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
