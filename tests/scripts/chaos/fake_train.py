"""A stand-in for train.py that starts at once, counts steps, saves and resumes; BROKEN=... breaks one promise."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from stdit.checkpoint_files import newest_whole, publish, step_of, write_manifest

STEPS, EVERY = 30, 2
BROKEN = os.environ.get("BROKEN", "")


def save(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.broken{time.time_ns()}"))
    aside = folder if BROKEN == "not aside" else folder.with_name(f"{folder.name}.tmp")
    aside.mkdir(parents=True, exist_ok=True)
    (aside / "weights").write_bytes(b"w" * 10_000)
    time.sleep(0.3 if BROKEN == "not aside" else 0.03)
    write_manifest(aside, {"step": step})
    if aside != folder:
        publish(aside, folder)


def resume(run: Path) -> int:
    newest, passed_over = newest_whole(run / "checkpoints")
    if BROKEN != "silent":
        print(*(f"checkpoint skipped: {reason}" for reason in passed_over), sep="\n", flush=True)
    for left in (run / "checkpoints").glob("*.tmp"):
        left.rename(left.with_suffix(f".left{time.time_ns()}"))
    return 0 if newest is None or BROKEN == "from step 0" else step_of(newest) or 0


def main() -> None:
    run = Path(sys.argv[sys.argv.index("--output_dir") + 1]) / sys.argv[sys.argv.index("--name") + 1]
    run.mkdir(parents=True, exist_ok=True)
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    if BROKEN == "orphan":
        subprocess.Popen(["sleep", "30"], start_new_session=True)
    start = resume(run)
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)[:start] if metrics.exists() else []
    metrics.write_text("".join(lines))
    with metrics.open("a") as file:
        for step in range(start, STEPS):
            time.sleep(0.02)
            loss = 1 / (step + 1) + (1e-7 if BROKEN == "drift" and start else 0)
            line = {"step": step, "loss": loss, "lr": 1.0, "grad_norm": loss, "seconds": time.perf_counter()}
            file.write(json.dumps(line) + "\n")
            file.flush()
            if asked or (step + 1) % EVERY == 0:
                save(run, step + 1)
            while asked and BROKEN == "deaf":
                time.sleep(1)
            if asked and BROKEN == "no save":
                file.write(json.dumps({**line, "step": step + 1}) + "\n")
            if asked:
                sys.exit(0)
    (run / "pipeline" / "transformer").mkdir(parents=True)
    save_file({"weight": np.ones(3, np.float32)}, run / "pipeline" / "transformer" / "model.safetensors")


main()
