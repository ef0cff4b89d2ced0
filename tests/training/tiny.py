"""Tiny runs of a few seconds: small clips on disk, and settings of a tiny model."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from stdit.data.batch import EncodedBatch
from stdit.diffusion.config import FlowConfig
from stdit.diffusion.flow import FlowObjective
from stdit.models.stdit import STDiT
from stdit.parallel.processes.mesh import Mesh
from stdit.pipelines.video_io import write_mp4
from stdit.pipelines.weights import FrozenModel
from stdit.training.config import EMAConfig, OptimizerConfig, TrainerConfig
from stdit.training.distillation import GuidanceTeacher
from stdit.training.flow_matching import FlowMatching
from stdit.training.memory_config import MemoryConfig
from stdit.training.trainer import Trainer
from tests.codecs.tiny import save_tiny_bert

ALONE = Mesh()


def tiny_model(**settings: object) -> STDiT:
    """Return a tiny model in which every branch contributes from the start."""
    torch.manual_seed(0)
    defaults = dict(
        depth=1, hidden_size=32, num_heads=2, caption_channels=16, model_max_length=8, gate_init=0.5
    )
    return STDiT(**{**defaults, **settings})


def tiny_trainer(
    model: STDiT,
    optimizer: OptimizerConfig,
    mesh: Mesh = ALONE,
    shard_parameters: bool = False,
    memory: MemoryConfig | None = None,
    ema: float = 0.9,
    method: Callable[[FlowObjective], FlowMatching] = FlowMatching,
    **settings: Any,
) -> Trainer:
    """Return a trainer for `tiny_batch`; ``settings`` are those of `TrainerConfig`."""
    AcceleratorState._reset_state(True)  # accelerate allows one precision a process
    config, flow = TrainerConfig(**settings), FlowObjective(FlowConfig(conditioning={"first": 0.5}), None)
    return Trainer(
        model,
        method(flow),
        Accelerator(cpu=True, mixed_precision="bf16" if config.precision == "bf16" else "no"),
        mesh,
        config,
        optimizer,
        EMAConfig(decay=ema),
        seed=1,
        shard_parameters=shard_parameters,
        memory=memory,
    )


def tiny_teacher(model: STDiT, scales: tuple[float, float] = (1.0, 4.0)) -> GuidanceTeacher:
    """Return the teacher of a student that takes these guidance scales."""
    return GuidanceTeacher(model, scales, FrozenModel("", "", []))


def tiny_batch(
    step: int, size: int = 4, frames: int = 2, columns: int = 4, mesh: Mesh = ALONE
) -> EncodedBatch:
    """Return a rank's part of the batch of a step."""
    generator = torch.Generator().manual_seed(step)
    mask = torch.arange(5)[None] < torch.randint(1, 6, (size, 1), generator=generator)
    batch = EncodedBatch(
        step=step,
        batch_size=size,
        captions=["a red square"] * size,
        clip_indices=torch.arange(size),
        fps=torch.full((size,), 8.0),
        height=torch.full((size,), 4.0),
        width=torch.full((size,), float(columns)),
        latents=torch.randn(size, 3, frames, 4, columns, generator=generator),
        text_states=torch.randn(size, 5, 16, generator=generator),
        text_mask=mask,
    )
    return batch.rows(mesh.sample_range(size))


def save_clips(folder: Path, count: int = 5, frames: int = 4, size: int = 8) -> Path:
    """Write clips of a square that moves, with captions, and return their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        video = np.full((frames, size, size, 3), 40 * index % 256, dtype=np.uint8)
        for frame in range(frames):
            video[frame, 2:5, frame : frame + 3] = [250, 60, 10 * index]
        write_mp4(folder / f"clip-{index}.mp4", video, fps=8)
        rows.append(
            {"path": f"clip-{index}.mp4", "text": f"the red square moves {'right left'.split()[index % 2]}"}
        )
    with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["path", "text"])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "manifest.csv"


def tiny_settings(folder: Path) -> list[str]:
    """Arguments of ``train.py`` for a run under ``folder``; clips and text encoder are made if they do not exist."""
    if not (folder / "clips").exists():
        save_clips(folder / "clips")
        save_tiny_bert(folder / "bert")
    text = f"""
name: tiny
output_dir: {folder / "outputs"}
data:
  manifest: {folder / "clips" / "manifest.csv"}
  buckets: [{{num_frames: 4, height: 8, width: 8, fps: 8, batch_size: 2}}]
codec: {{name: pixel}}
text_encoder: {{name: auto, path: {folder / "bert"}, max_length: 12}}
model: {{depth: 1, hidden_size: 32, num_heads: 2, patch_size: [1, 4, 4], input_sq_size: 8}}
flow: {{conditioning: {{first: 0.3}}}}
trainer: {{steps: 6, device: cpu}}
optimizer: {{name: muon, lr: 1.0e-3}}
checkpoint: {{every: 2}}
"""
    (folder / "tiny.yaml").write_text(text, encoding="utf-8")
    return ["--config", str(folder / "tiny.yaml")]
