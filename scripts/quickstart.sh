#!/usr/bin/env bash
# Show videos of the model that comes with stdit, then train one on the embedded data set, sample from it, and score its
# videos; no GPU needed. Sets up .venv first.
# Run it again after an interruption: training resumes, and videos and scores of the current models are reused.
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

newer_than_sheets() {
    [ "$1" -nt outputs/bundled/videos/sheet.png ] && [ "$1" -nt outputs/quickstart/videos/sheet.png ]
}

if [ ! outputs/bundled/videos/sheet.png -nt stdit/bundled/meta.json ]; then  # sample.py writes the sheet last
    rm -rf outputs/bundled/videos
    run python sample.py --config configs/sample/bundled.yaml
fi
echo
echo "Videos of the model that comes with stdit: outputs/bundled/videos/*.mp4, all on outputs/bundled/videos/sheet.png"
run python scripts/make_shapes.py --output data/shapes
run python train.py --config configs/train/quickstart.yaml
if [ ! -e outputs/quickstart/pipeline/model_index.json ]; then  # train.py exits with 0 after SIGTERM as well
    echo "Training was stopped before its end: run the same command again to resume." >&2
    exit 143
fi
if ! newer_than_model outputs/quickstart/videos/sheet.png; then
    rm -rf outputs/quickstart/videos
    run python sample.py --checkpoint outputs/quickstart --prompts data/shapes/prompts.txt --output outputs/quickstart/videos
fi
if ! newer_than_model outputs/quickstart/scores.json; then
    run python scripts/evaluate_adherence.py --checkpoint outputs/quickstart --output outputs/quickstart/scores.json
fi
if ! newer_than_sheets outputs/quickstart/sheets.png; then
    run python scripts/contact_sheet.py outputs/bundled/videos outputs/quickstart/videos --output outputs/quickstart/sheets.png
fi

echo
echo "Videos:        outputs/quickstart/videos/*.mp4"
echo "Contact sheet: outputs/quickstart/videos/sheet.png"
echo "Both models:   outputs/quickstart/sheets.png"
echo "Scores:        outputs/quickstart/scores.json"
