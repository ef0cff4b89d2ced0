#!/usr/bin/env bash
# The main job on the embedded data set, on a CPU: train, sample from prompts, score. Sets up .venv first. What an
# earlier call has finished is used again; an interrupted training goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh ''

run() {
    echo
    echo "\$ $*"
    "$@"
}

run python scripts/make_shapes.py --output data/shapes
run python train.py --config configs/train/quickstart.yaml
if [ ! -e outputs/quickstart/videos/sheet.png ]; then
    run python sample.py --checkpoint outputs/quickstart --prompts data/shapes/prompts.txt --output outputs/quickstart/videos
fi
run python scripts/evaluate_adherence.py --checkpoint outputs/quickstart --output outputs/quickstart/scores.json

echo
echo "Videos:        outputs/quickstart/videos/*.mp4"
echo "Contact sheet: outputs/quickstart/videos/sheet.png"
echo "Scores:        outputs/quickstart/scores.json"
