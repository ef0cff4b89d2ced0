"""Measure decoding in tiles: the memory that is stated and that is taken, the time, and how much pixels change.

    python scripts/bench/decoding.py --num_frames 49 --height 320 --width 320 --codec.tile 192
    torchrun --nproc_per_node 2 scripts/bench/decoding.py --codec.tile 192
    python scripts/bench/decoding.py --codec.name AutoencoderKLWan --codec.path Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
--codec.subfolder vae --codec.dtype bf16 --device cuda --num_frames 81 --height 720 --width 1280 --codec.tile 512

Random latents are decoded. Memory is that of the process beyond its weights: on a CPU the growth of resident memory,
most exact with MALLOC_MMAP_THRESHOLD_=65536 in the environment. All processes share the tiles. A video whose whole
decoding fits in memory is also decoded so, for the comparison.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from stdit.cli import run
from stdit.codecs import CodecConfig, build_codec
from stdit.codecs.tiling import Ranks, tiled_bytes
from stdit.errors import UserError
from stdit.parallel.config import SamplingParallelConfig
from stdit.parallel.processes.device import join_processes
from stdit.parallel.processes.memory import free_memory
from stdit.parallel.processes.mesh import build_mesh
from stdit.parallel.sequence.planner import format_gib
from stdit.settings import parse


def _tiny() -> CodecConfig:
    return CodecConfig(name="tiny", tile=192)


@dataclass
class Bench:
    """Measure decoding in tiles."""

    codec: CodecConfig = field(default_factory=_tiny)
    """The codec, and its tiles."""
    num_frames: int = 49
    """Frames of the video."""
    height: int = 320
    """Its rows of pixels."""
    width: int = 320
    """Its columns of pixels."""
    device: str = "cpu"
    """cpu, cuda, ..."""

    def __post_init__(self) -> None:
        if min(self.num_frames, self.height, self.width) < 1:
            raise UserError("num_frames, height and width: must be at least 1")


def main() -> None:
    config = parse(Bench, doc=__doc__)
    device = join_processes(config.device, timeout=1800)
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    mesh = build_mesh(SamplingParallelConfig(sp=world), device)
    ranks = Ranks(mesh.sp, mesh.cfg)

    codec = build_codec(config.codec).to(device)
    size = (config.num_frames, config.height, config.width)
    shape = codec.latent_shape(*size)
    latents = torch.randn(1, codec.channels, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    codec.decode(latents[:, :, :1, :4, :4])  # libraries are loaded
    plan = codec.tile_plan(shape, *size, ranks=ranks)
    tiled, seconds, peak = measure(lambda: codec.decode(latents, *size, plan, ranks), device)
    stated = tiled_bytes(codec, plan)
    rows = mesh.all_gather_objects((seconds, peak))
    if not mesh.is_main:
        return
    print(f"{plan}, {world} {'process' if world == 1 else 'processes'}: {max(rows)[0]:.2f} s")
    of_ranks = ", ".join(format_gib(one) for _, one in rows)
    print(f"memory: {format_gib(stated)} GiB stated, {of_ranks} GiB taken")
    codec.disable_tiling()
    whole = codec.decoding_bytes(shape)
    if plan.whole or whole > free_memory(device):
        return
    expected, seconds, peak = measure(lambda: codec.decode(latents, *size), device)
    print(f"whole: {seconds:.2f} s, {format_gib(whole)} GiB stated, {format_gib(peak)} GiB taken")
    differences = (tiled - expected).abs() * 127.5
    print(f"difference in levels of 255: mean {differences.mean():.3f}, largest {differences.max():.1f}")


def measure(decode: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float, int]:
    """Return a decoded video, the seconds that it took, and the peak bytes that the process took more than before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
    began = time.perf_counter()
    video = decode()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")
    return video, seconds, peak - before


def resident(key: str) -> int:
    """Return the bytes of a line of Linux's account of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


if __name__ == "__main__":
    run(main)
