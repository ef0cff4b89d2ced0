#!/usr/bin/env bash
# Check format, lint, spelling and types, then run the tests. Sets up .venv first. Arguments go to pytest:
#   bash scripts/test.sh tests/models
#   bash scripts/test.sh -m slow
#   bash scripts/test.sh --fast           # those of tests/fast.txt, which touch each package
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh '[dev]'

ruff format --check .
ruff check .
codespell
mypy
if [ $# -eq 0 ]; then
    set -- -m "not slow and not gpu"
elif [ "$1" = --fast ]; then
    shift
    set -f # a name with [...] is no pattern
    # shellcheck disable=SC2046 # a word a test
    set -- -m "not slow and not gpu" $(grep '^tests/' tests/fast.txt) "$@"
    set +f
fi
# A test file per core and one more at a time, since many wait for processes; in the order of tests/conftest.py.
workers=$(python -c 'import os; print(min(4, 1 + (os.cpu_count() or 1)))')
OMP_NUM_THREADS=1 python -m pytest --numprocesses "$workers" --dist loadfile --no-loadscope-reorder "$@"
