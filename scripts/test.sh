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
python -m pytest "$@"
