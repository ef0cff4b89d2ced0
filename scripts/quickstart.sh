#!/usr/bin/env bash
# Train on the embedded data set, sample from prompts, and score the videos; no GPU needed. Sets up .venv first.
# Run it again after an interruption: training resumes, and videos and scores of the current model are reused.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh ''

run() {
    echo
    echo "\$ $*"
    "$@"
}

newer_than_model() {
    [ "$1" -nt outputs/quickstart/pipeline/model_index.json ]
}

run python scripts/make_shapes.py --output data/shapes
run python train.py --config configs/train/quickstart.yaml
if [ ! -e outputs/quickstart/pipeline/model_index.json ]; then  # train.py exits with 0 after SIGTERM as well
    echo "Training was stopped before its end: run the same command again to resume." >&2
    exit 143
fi
if ! newer_than_model outputs/quickstart/videos/sheet.png; then  # sample.py writes the sheet last
    rm -rf outputs/quickstart/videos
    run python sample.py --checkpoint outputs/quickstart --prompts data/shapes/prompts.txt --output outputs/quickstart/videos
fi
if ! newer_than_model outputs/quickstart/scores.json; then
    run python scripts/evaluate_adherence.py --checkpoint outputs/quickstart --output outputs/quickstart/scores.json
fi

echo
echo "Videos:        outputs/quickstart/videos/*.mp4"
echo "Contact sheet: outputs/quickstart/videos/sheet.png"
echo "Scores:        outputs/quickstart/scores.json"
