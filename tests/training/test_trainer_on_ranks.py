"""The trainer on several processes against one: every option, with weights replicated and sharded."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from stdit.parallel.config import TrainingParallelConfig
from stdit.parallel.group import Group
from stdit.parallel.mesh import Mesh, build_mesh
from stdit.parallel.parameters import state_bytes, whole
from stdit.training.optim import OptimizerConfig
from stdit.training.trainer import Trainer
from tests.parallel.ranks import run_on_ranks
from tests.parallel.test_layout import average, close
from tests.training.tiny import tiny_batch, tiny_model, tiny_trainer

STEPS, BATCH = 3, 3
# AdamW divides gradients by their size, even where they are but rounding (the biases of keys); a large eps does not.
ADAMW = OptimizerConfig(name="adamw", lr=1e-2, eps=1e-3, weight_decay=0.1)
MUON = OptimizerConfig(name="muon", lr=1e-2, eps=1e-3, weight_decay=0.1)
OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Muon": {"optimizer": MUON},
    "accumulation": {"micro_batch_size": 1},
    "activation checkpointing": {"checkpointing": True},
    "compiled": {"compiled": True, "depth": 1},
    "pieces, checkpointing, no clipping": {"chunks": 2, "checkpointing": True, "max_grad_norm": float("inf")},
}


def mesh_of(sp: int, chunks: int = 1) -> Mesh:
    return build_mesh(TrainingParallelConfig(sp=sp, overlap_chunks=chunks), torch.device("cpu"))


def trainer(
    mesh: Mesh,
    shard_parameters: bool = False,
    optimizer: OptimizerConfig = ADAMW,
    checkpointing: bool = False,
    compiled: bool = False,
    depth: int = 2,
    max_grad_norm: float = 0.1,
    **settings: Any,
) -> Trainer:
    """A trainer of a model without zeros."""
    model = tiny_model(in_channels=3, depth=depth, patch_size=(1, 2, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            assert (parameter != 0).all()
    if checkpointing:
        model.enable_gradient_checkpointing()
    if compiled:
        model.compile_blocks(backend="aot_eager", dynamic=False)
    settings |= {"max_grad_norm": max_grad_norm}
    return tiny_trainer(model, optimizer, mesh, shard_parameters, **settings)


def batch(mesh: Mesh, step: int) -> dict[str, Any]:
    return tiny_batch(step, BATCH, frames=4, columns=6, mesh=mesh)


def train(one: Trainer, steps: range = range(STEPS)) -> list[dict[str, Any]]:
    return [one.step(step, batch(one.mesh, step)) for step in steps]


def tensors(one: Trainer) -> dict[str, Tensor]:
    """Weights, averages and optimizer state, whole."""
    parts = {"weight": one.model, "average": one.ema, "state": one.optimizer}
    return {
        f"{what} {name}": whole(tensor).clone()
        for what, part in parts.items()
        for name, tensor in part.state_dict().items()  # type: ignore[attr-defined]
    }


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def check(found: Trainer, expected: Trainer, what: str, tolerance: float, rate: float) -> None:
    """Train both, and compare losses and norms of each step, and what is left at the end."""
    for one, other in zip(train(found), train(expected), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=tolerance), what
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * tolerance), what
    results = tensors(found)
    for name, tensor in tensors(expected).items():
        close(results[name], tensor, rate, f"{what}: {name}")


def compare(group: Group, sp: int, names: list[str]) -> None:
    for name in names:
        options = dict(OPTIONS[name])
        mesh = mesh_of(sp, options.pop("chunks", 1))
        alone = {key: value for key, value in options.items() if key not in ("compiled", "checkpointing")}
        for sharded in (False, True):
            torch.compiler.reset()
            counters.clear()
            found = trainer(mesh, sharded, **options)
            assert all(isinstance(p, DTensor) == sharded for p in found.parameters)
            check(found, trainer(Mesh(), **alone), f"{name}, sharded {sharded}", 1e-5, 1e-4)
            assert (counters["frames"]["ok"] >= 2) == ("compiled" in options)


def everything_on_two(group: Group, sp: int, folder: Path) -> None:
    compare(group, sp, [name for name in OPTIONS if name != "compiled" or sp == 2])  # compiling takes long
    compare_bf16(sp)
    skip_alike(sp)
    keep_a_share(sp)
    resume(sp, folder)


def compare_bf16(sp: int) -> None:
    """Sharded and replicated round alike; one process rounds sums of other terms."""
    mesh = mesh_of(sp)
    check(
        trainer(mesh, True, precision="bf16"),
        trainer(mesh, False, precision="bf16"),
        "bf16, sharded",
        1e-6,
        1e-5,
    )
    check(trainer(mesh, True, precision="bf16"), trainer(Mesh(), precision="bf16"), "bf16", 2e-2, 0.2)


def skip_alike(sp: int) -> None:
    """One sample that is not finite, on one rank's part of the batch, stops the step on all."""
    for sharded in (False, True):
        one = trainer(mesh_of(sp), sharded)
        train(one)
        before = tensors(one)
        broken = batch(one.mesh, STEPS)
        if one.mesh.part == one.mesh.dp - 1:
            broken["latents"][-1, :, -1] = float("nan")
        values = one.step(STEPS, broken)
        assert values["skipped"] and values["grad_norm"] is None
        assert equal(tensors(one), before)
        assert not one.step(STEPS, batch(one.mesh, STEPS))["skipped"]


def keep_a_share(sp: int) -> None:
    """What the ranks keep is, in all, what one process keeps."""
    one = trainer(mesh_of(sp), True)
    train(one)
    one.accumulate(0, batch(one.mesh, 0))
    kept = [
        *one.parameters,
        *(p.grad for p in one.parameters),
        *one.ema.average.values(),
        *(value for name, value in one.optimizer.state_dict().items() if not name.endswith(".step")),
    ]
    mine = sum(tensor.to_local().nbytes for tensor in kept)  # type: ignore[union-attr]
    count = sum(p.numel() for p in one.parameters)
    total = float(average(torch.tensor(float(mine)))) * one.mesh.size
    assert total == state_bytes(count, 1, False)
    assert (
        state_bytes(count, one.mesh.size, True) * 0.9 < mine < state_bytes(count, one.mesh.size, True) * 1.1
    )


def resume(sp: int, folder: Path) -> None:
    """A state of sharded weights is that of whole ones: a run goes on with it either way."""
    mesh, first, rest = mesh_of(sp), range(2), range(2, 4)
    saved, again, alone, back = (trainer(on, on is mesh, MUON) for on in (mesh, mesh, Mesh(), mesh))
    train(saved, first)
    write(saved, mesh, folder / "sharded")
    for one in (again, alone):
        one.read(folder / "sharded", {"nonfinite_in_a_row": 0})
        assert equal(tensors(one), tensors(saved))
    write(alone, mesh, folder / "whole")
    same_files(folder / "whole", folder / "sharded")
    expected = train(saved, rest)
    assert train(again, rest) == expected

    for values, other in zip(train(alone, rest), expected, strict=True):
        assert values["loss"] == pytest.approx(other["loss"], rel=1e-5)
    write(alone, mesh, folder / "later")
    back.read(folder / "later", {"nonfinite_in_a_row": 0})
    check(back, alone, "resumed", 1e-5, 1e-4)


def write(one: Trainer, mesh: Mesh, folder: Path) -> None:
    """Write from the first rank, as a run does."""
    state = one.gather()
    assert all(bool(part) == one.mesh.is_first for part in state.values())
    if mesh.is_first:
        folder.mkdir()
        one.write(folder, state)
    dist.barrier()


def same_files(one: Path, other: Path) -> None:
    names = [path.relative_to(one) for path in sorted(one.rglob("*")) if path.is_file()]
    assert len(names) == 4 and {path.name for path in names} >= {"config.json", "ema.safetensors"}
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("sp", [1, 2])
def test_every_option_on_two_ranks(sp: int, tmp_path: Path) -> None:
    run_on_ranks(2, everything_on_two, sp, tmp_path)


@pytest.mark.parametrize("ranks, sp", [(4, 2), (3, 3)])
def test_equals_one_process(ranks: int, sp: int) -> None:
    run_on_ranks(ranks, compare, sp, ["AdamW", "Muon", "accumulation"])
