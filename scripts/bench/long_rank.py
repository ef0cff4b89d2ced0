"""One rank of long.py, which starts it: one training step on this rank's share of a video; rank 0 writes the figures.

    python scripts/bench/long_rank.py '{"frames": 4, ...}'

Takes RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the environment.
"""

import ctypes
import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # where scripts.* is found

from scripts.bench.sequence_rank import CAPTION, from_all, grid_of, largest, resident, timed
from stdit.cli import run
from stdit.diffusion.config import FlowConfig
from stdit.diffusion.flow import FlowObjective, frame_weights
from stdit.models.stdit import STDiT
from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.processes.parameters import gather_full_tensors, shard_model
from stdit.parallel.sequence.group import Group, Traffic
from stdit.parallel.sequence.layouts import Span
from stdit.parallel.sequence.stages import Speeds

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
CPU = torch.device("cpu")
NOISE = 0.05
"""Standard deviation of what is added to all weights, so that none is zero."""
LEARNING_RATE = 1e-4


def main() -> None:
    settings = json.loads(sys.argv[1])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(settings["threads"])
    if ranks > 1:
        dist.init_process_group("gloo")
    group = Group.of(dist.group.WORLD) if ranks > 1 else Group()  # type: ignore[arg-type]
    step = Step(settings, Mesh(rank, ranks, group))
    figures = step.measure()
    tensors = step.results() if settings["check"] else {}
    if rank == 0:
        save_file(tensors, f"{settings['figures']}.safetensors")
        Path(settings["figures"]).write_text(json.dumps(figures), encoding="utf-8")
    if ranks > 1:
        dist.destroy_process_group()


class Step:
    """One training step on this rank's share of a video of random latents; the weights are sharded over all ranks."""

    def __init__(self, settings: dict[str, Any], mesh: Mesh) -> None:
        self.mesh, self.dtype = mesh, DTYPES[settings["precision"]]
        self.model = random_model(settings["model"], self.dtype)
        self.model.set_activations(["recompute"] * len(self.model.blocks))
        self.network = shard_model(self.model, mesh).module
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE)
        _, ph, pw = self.model.config.patch_size
        self.size = settings["frames"], settings["height"] * ph, settings["width"] * pw
        self.group = replace(
            mesh.sp,
            grid=grid_of(f"grid {settings['grid']}", mesh.world_size),
            speeds=Speeds(*settings["speeds"]),
            traffic=Traffic(),
        )
        self.sharding = self.model.token_sharding(self.group, *self.size)

        self.flow = FlowObjective(FlowConfig())
        frames = self.sharding.row_tokens[mesh.rank].frames
        self.x, self.noise = (self.random_latents(frames, seed) for seed in (0, 1))
        self.t = torch.full((1, 1), 0.5, dtype=self.dtype)
        weight = frame_weights(torch.zeros(1, self.size[0], dtype=torch.bool))
        self.weight = self.sharding.split(weight, dim=1)
        text = (1, CAPTION["model_max_length"], CAPTION["caption_channels"])
        generator = torch.Generator().manual_seed(0)
        self.condition = {
            "timestep": 1000 * self.t,
            "encoder_hidden_states": torch.randn(text, generator=generator).to(self.dtype),
            "fps": torch.full((1,), 24, dtype=self.dtype),
            "height": torch.full((1,), 8 * self.size[1], dtype=self.dtype),
            "width": torch.full((1,), 8 * self.size[2], dtype=self.dtype),
        }

    def random_latents(self, frames: Span, seed: int) -> Tensor:
        """Return latents ``[1 C T_n H W]`` of some frames; each is a function of the seed and its place alone."""
        T, H, W = self.size
        latents = torch.empty(1, self.model.config.in_channels, frames.size, H, W, dtype=self.dtype)
        for index in range(frames.size):
            generator = torch.Generator().manual_seed(seed * T + frames.begin + index)
            latents[:, :, index] = torch.randn(1, latents.shape[1], H, W, generator=generator)
        return latents

    def measure(self) -> dict[str, Any]:
        """Do the step; return the seconds of its parts on the slowest rank, what is sent, and memory by rank."""
        release_memory()
        before = from_all({"pss": proportional(os.getpid()), "rss": resident("VmRSS")})
        seconds = {
            part: largest(timed(getattr(self, part), CPU)) for part in ("forward", "backward", "update")
        }
        return {
            "grid": list(self.sharding.grid),
            "loss": float(self.mesh.all_reduce_mean(self.loss.detach())),
            "seconds": seconds,
            "sent_bytes": largest(self.group.traffic.bytes.total()),
            "pss_before": [rank["pss"] for rank in before],
            "rss_before": [rank["rss"] for rank in before],
            "peak_rss": from_all(resident("VmHWM")),
        }

    def forward(self) -> None:
        """Compute this rank's part of the loss, of which the mean over all ranks is the loss of the video."""
        x_t = self.flow.add_noise(self.x, self.noise, self.t)
        self.output = self.network(hidden_states=x_t, **self.condition, sharding=self.sharding).sample
        losses = self.flow.loss(self.output, self.x - self.noise, x_t, self.t, self.weight)
        self.loss = losses.sum() * (self.mesh.world_size / self.sharding.grid.space)

    def backward(self) -> None:
        """Compute all gradients, averaged over the ranks."""
        self.loss.backward()

    def update(self) -> None:
        """Update this rank's shards of the weights."""
        self.optimizer.step()

    def results(self) -> dict[str, Tensor]:
        """Return output, loss, gradients and updated weights, on the main rank alone; every rank must call this."""
        output = self.sharding.gather(self.output.detach(), 2, self.size[0])
        loss = self.mesh.all_reduce_mean(self.loss.detach())
        parameters = dict(self.model.named_parameters())
        gradients = {name: one.grad for name, one in parameters.items() if one.grad is not None}
        weights = {name: one.detach() for name, one in parameters.items()}
        found = {"output": output.contiguous(), "loss": loss} if self.mesh.is_main else {}
        for kind, tensors in (("gradient", gradients), ("weight", weights)):
            full = gather_full_tensors(tensors, self.mesh)
            found |= {f"{kind} {name}": tensor for name, tensor in full.items()}
        return found


def random_model(settings: dict[str, Any], dtype: torch.dtype) -> STDiT:
    """Return a model in which no weight is zero, the same on every rank."""
    torch.manual_seed(0)
    model = STDiT(**settings, **CAPTION, pred_sigma=False)
    for parameter in model.parameters():
        parameter.data = (parameter.data + NOISE * torch.randn_like(parameter)).to(dtype)
    return model


def release_memory() -> None:
    """Return memory that is not in use to the system, where the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def proportional(pid: int) -> int:
    """Return the bytes of a process in memory, pages that it shares divided among their owners (PSS).

    0 if it has ended.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


if __name__ == "__main__":
    run(main)
