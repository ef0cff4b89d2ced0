#!/usr/bin/env bash
# The main job on the embedded data set, on a CPU: train, sample from prompts, score. Sets up .venv first. What an
# earlier call has finished is used again, as long as it was made from the model as it is now; an interrupted
# training goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh ''

run() {
    echo
    echo "\$ $*"
    "$@"
}

newer_than_the_model() {
    [ "$1" -nt outputs/quickstart/pipeline/model_index.json ]
}

run python scripts/make_shapes.py --output data/shapes
run python train.py --config configs/train/quickstart.yaml
if [ ! -e outputs/quickstart/pipeline/model_index.json ]; then  # after SIGTERM training ends with 0, too
    echo "Training is not finished: run this again, and it goes on." >&2
    exit 143
fi
if ! newer_than_the_model outputs/quickstart/videos/sheet.png; then  # which is written last
    rm -rf outputs/quickstart/videos
    run python sample.py --checkpoint outputs/quickstart --prompts data/shapes/prompts.txt --output outputs/quickstart/videos
fi
if ! newer_than_the_model outputs/quickstart/scores.json; then
    run python scripts/evaluate_adherence.py --checkpoint outputs/quickstart --output outputs/quickstart/scores.json
fi

echo
echo "Videos:        outputs/quickstart/videos/*.mp4"
echo "Contact sheet: outputs/quickstart/videos/sheet.png"
echo "Scores:        outputs/quickstart/scores.json"
