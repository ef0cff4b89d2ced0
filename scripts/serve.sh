#!/usr/bin/env bash
# Set up .venv if needed, and start the page on http://localhost:8000. Arguments go to sample.py --serve:
#   bash scripts/serve.sh --server.port 8080
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh '[serve]'
exec python sample.py --serve "$@"
