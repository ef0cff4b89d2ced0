"""Measure the peak memory of a training run, and compare it with what ``--dry_run`` says.

    python scripts/bench/memory.py
    python scripts/bench/memory.py --model XL-2 --case lora-bf16 --case full-bf16-8bit
    python scripts/bench/memory.py --model B --steps 2 --output memory.json

Each case is a run of train.py from its first step to the checkpoint and the export at its end, with a model of random
weights, on one clip of 51 frames at 144p whose latents and text states have the shapes of Open-Sora v1.2 (noise takes
the place of its VAE and of T5, which are not loaded). Measured is the largest resident memory of the process (VmHWM).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from scripts.arguments import positive_int, preset_file
from stdit.cli import run, script_parser
from stdit.errors import UserError
from stdit.models.stdit import STDiT
from stdit.pipelines.video_io import write_mp4

ROOT = Path(__file__).resolve().parents[2]
BASE = "--trainer.precision bf16 --memory.activations recompute"
LORA = f"{BASE} --init_from {{model}} --lora.rank 16"
FULL = f"{BASE} --ema.decay 0"
CASES = {
    "lora-fp32": f"{LORA}",
    "lora-bf16": f"{LORA} --lora.base_dtype bf16",
    "lora-int8": f"{LORA} --lora.base_dtype int8",
    "lora-nf4": f"{LORA} --lora.base_dtype nf4",
    "full-fp32": f"{FULL}",
    "full-fused": f"{FULL} --memory.fused_backward true",
    "full-8bit": f"{FULL} --memory.optimizer_state 8bit",
    "full-4bit": f"{FULL} --memory.optimizer_state 4bit",
    "full-bf16": f"{FULL} --memory.weights bf16",
    "full-bf16-8bit": f"{FULL} --memory.weights bf16 --memory.optimizer_state 8bit",
    "full-bf16-8bit-fused": f"{FULL} --memory.weights bf16 --memory.optimizer_state 8bit --memory.fused_backward "
    "true",
}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--model", default="S", help="a preset of configs/models, such as XL-2")
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated (all)")
    parser.add_argument("--steps", type=positive_int, default=1)
    parser.add_argument("--folder", type=Path, help="folder to write to (that of temporary files)")
    parser.add_argument("--output", type=Path, help="a JSON file of all figures")
    args = parser.parse_args()
    preset = preset_file(args.model)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    figures = []
    try:
        cases = args.case or list(CASES)
        write_clip(folder)
        if any(case.startswith("lora") for case in cases):
            write_model(folder / "model", preset)
        print(f"{'case':<24}{'GiB':>8}{'foreseen':>10}{'ratio':>7}{'s/step':>9}", flush=True)
        for case in cases:
            figures.append(found := measure(case, folder, preset, args.steps))
            print(
                f"{case:<24}{found['gib']:8.2f}{found['foreseen_gib']:10.2f}{found['ratio']:7.2f}"
                f"{found['step_seconds']:9.1f}",
                flush=True,
            )
    finally:
        shutil.rmtree(folder)
        if args.output:
            args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def write_clip(folder: Path) -> None:
    """Write a clip of 51 frames at 144p and its manifest."""
    write_mp4(folder / "clip.mp4", np.zeros((51, 144, 256, 3), dtype=np.uint8), fps=24)
    (folder / "manifest.csv").write_text("path,text\nclip.mp4,a clip\n", encoding="utf-8")


def write_model(folder: Path, preset: Path) -> None:
    """Write a model of random weights in bf16, none of them zero; in a process of its own, whose memory goes."""
    code = (
        "import sys, torch; from scripts.bench.memory import random_model; "
        "random_model(sys.argv[2]).save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(preset)], cwd=ROOT, check=True)


def random_model(preset: str) -> STDiT:
    """Return a model of a preset with random weights in bf16."""
    torch.manual_seed(0)
    model = STDiT(**yaml.safe_load(Path(preset).read_text(encoding="utf-8"))["model"])
    for parameter in model.parameters():
        parameter.data = (parameter.data + 0.02 * torch.randn_like(parameter)).to(torch.bfloat16)
    return model


def measure(case: str, folder: Path, preset: Path, steps: int) -> dict[str, Any]:
    """Do a run of a case; return its figures."""
    bucket = {"num_frames": 51, "fps": 24, "resolution": "144p", "aspect_ratio": "16:9", "batch_size": 1}
    command = [
        sys.executable,
        "train.py",
        *("--config", str(preset), "--import", "scripts.bench.shapes_only"),
        *("--codec.name", "opensora_shapes", "--text_encoder.name", "t5_shapes"),
        *("--data.manifest", str(folder / "manifest.csv"), "--data.buckets", json.dumps([bucket])),
        *("--output_dir", str(folder / "outputs"), "--name", case, "--trainer.steps", str(steps)),
        *("--trainer.device", "cpu", "--data.workers", "0"),
        *CASES[case].format(model=folder / "model").split(),
    ]
    shown = subprocess.run([*command, "--dry_run", "true"], cwd=ROOT, capture_output=True, text=True)
    line = re.search(r"memory: about ([\d,]+) MiB.*", shown.stdout)
    if line is None:
        raise UserError(f"{case}: --dry_run failed:\n{shown.stdout}{shown.stderr[-2000:]}")
    with open(folder / "log.txt", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status):
            raise UserError(f"{case}: train.py failed:\n{(folder / 'log.txt').read_text()[-2000:]}")
    metrics = (folder / "outputs" / case / "metrics.jsonl").read_text(encoding="utf-8")
    seconds = json.loads(metrics.splitlines()[-1])["seconds"]
    shutil.rmtree(folder / "outputs")
    peak, foreseen = usage.ru_maxrss / 2**20, int(line[1].replace(",", "")) / 2**10
    return {
        "case": case,
        "gib": peak,
        "foreseen_gib": foreseen,
        "ratio": foreseen / peak,
        "step_seconds": seconds,
        "parts": line[0],
    }


if __name__ == "__main__":
    run(main)
