"""The trainer on several processes against one: every option, with weights replicated and sharded."""

import copy
import json
import signal
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from stdit.checkpoint_files import read_meta, verify
from stdit.data.batch import EncodedBatch
from stdit.errors import OtherRankError, UserError
from stdit.lora.adapters import add_adapter
from stdit.lora.config import LoRAConfig
from stdit.parallel.config import TrainingParallelConfig
from stdit.parallel.processes.mesh import Mesh, build_mesh
from stdit.parallel.processes.parameters import full_tensor
from stdit.parallel.processes.step_exchange import StepExchange
from stdit.parallel.sequence.group import Group
from stdit.pipelines.weights import load_transformer
from stdit.training import checkpoint_writer
from stdit.training.checkpoint_writer import CheckpointWriter
from stdit.training.config import CheckpointConfig, OptimizerConfig
from stdit.training.distillation import GuidanceDistillation
from stdit.training.few_steps import DistributionMatching, ScoreMatching
from stdit.training.stop_signals import StopSignals
from stdit.training.trainer import Trainer
from tests.parallel.ranks import run_on_ranks
from tests.parallel.sequence.test_sharding import average, close
from tests.training.test_validation_loss import measured
from tests.training.tiny import tiny_batch, tiny_model, tiny_teacher, tiny_trainer

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
    "adapter": {"lora": LoRAConfig(rank=3, targets="blocks")},
    "adapter with dropout, checkpointing": {
        "lora": LoRAConfig(rank=3, targets="blocks", dropout=0.3),
        "checkpointing": True,
    },
    "student of guidance": {"student": "guidance", "micro_batch_size": 1},
    "student of few steps": {"student": "steps", "micro_batch_size": 1},
    "joint and linear blocks in space": {"blocks": "S J L", "in_space": True, "checkpointing": True},
    "compiled in space": {"blocks": "S L", "in_space": True, "compiled": True, "depth": 1},
    "joint and temporal, compiled in space": {
        "blocks": "J T",
        "in_space": True,
        "compiled": True,
        "depth": 1,
    },
    "chunks, checkpointing, no clipping": {"chunks": 2, "checkpointing": True, "max_grad_norm": float("inf")},
}


def mesh_of(sp: int | tuple[int, int], chunks: int = 1, in_space: bool = False) -> Mesh:
    grid = sp if isinstance(sp, tuple) else (1, sp) if in_space else (sp, 1)
    return build_mesh(TrainingParallelConfig(grid=grid, overlap_chunks=chunks), torch.device("cpu"))


def trainer(
    mesh: Mesh,
    shard_parameters: bool = False,
    optimizer: OptimizerConfig = ADAMW,
    checkpointing: bool = False,
    compiled: bool = False,
    depth: int = 2,
    blocks: str = "S T",
    max_grad_norm: float = 0.1,
    lora: LoRAConfig | None = None,
    student: Literal["guidance", "steps"] | None = None,
    **settings: Any,
) -> Trainer:
    """Return a trainer of a model, or of an adapter in it, in which no weight is zero."""
    sizes = {"in_channels": 3, "depth": depth, "blocks": blocks, "patch_size": (1, 2, 2)}
    model = tiny_model(**sizes, guidance_range=(1.0, 4.0) if student else None)
    if lora is not None:
        add_adapter(model, lora)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            assert (parameter != 0).all()
    if checkpointing:
        model.enable_gradient_checkpointing()
    if compiled:
        model.compile_blocks(backend="aot_eager", dynamic=False)
    settings |= {"max_grad_norm": max_grad_norm}
    build = partial(
        tiny_trainer, optimizer=optimizer, mesh=mesh, shard_parameters=shard_parameters, **settings
    )
    if student is None:
        return build(model)
    teacher = tiny_teacher(tiny_model(**sizes))
    if student == "guidance":
        return build(model, method=partial(GuidanceDistillation, teacher=teacher))
    score = build(
        copy.deepcopy(model), method=partial(ScoreMatching, teacher=teacher, steps=[1, 3], student=model)
    )
    method = partial(
        DistributionMatching, teacher=teacher, steps=[1, 3], student=model, score=score, updates=2
    )
    return build(model, method=method)


def batch(mesh: Mesh, step: int) -> EncodedBatch:
    return tiny_batch(step, BATCH, frames=4, columns=6, mesh=mesh)


def train(one: Trainer, steps: range = range(STEPS)) -> list[dict[str, Any]]:
    return [one.step(batch(one.mesh, step)) for step in steps]


def tensors(one: Trainer) -> dict[str, Tensor]:
    """Return weights, averages and optimizer state as full tensors."""
    return {
        f"{part} {name}": full_tensor(tensor).clone()
        for part, named in one.state().items()
        for name, tensor in named.items()
    }


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def check(found: Trainer, expected: Trainer, what: str, tolerance: float, rate: float) -> None:
    """Train both, and compare losses and norms of each step, and the final state."""
    for one, other in zip(train(found), train(expected), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=tolerance), what
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * tolerance), what
    results = tensors(found)
    for name, tensor in tensors(expected).items():
        close(results[name], tensor, rate, f"{what}: {name}")


def compare(group: Group, sp: int | tuple[int, int], names: list[str], turn: int | None = None) -> None:
    """Compare options with one process: each replicated and sharded; with a ``turn``, they take turns."""
    for place, name in enumerate(names):
        options = dict(OPTIONS[name])
        mesh = mesh_of(sp, options.pop("chunks", 1), options.pop("in_space", False))
        alone = {key: value for key, value in options.items() if key not in ("compiled", "checkpointing")}
        for sharded in (False, True) if turn is None else [(place + turn) % 2 == 1]:
            torch.compiler.reset()
            counters.clear()
            found = trainer(mesh, sharded, **options)
            assert all(isinstance(p, DTensor) == sharded for p in found.parameters)
            check(found, trainer(Mesh(), **alone), f"{name}, sharded {sharded}", 1e-5, 1e-4)
            assert (counters["frames"]["ok"] >= 2) == ("compiled" in options)


def compare_all(group: Group, sp: int, turn: int | None) -> None:
    compiled = ("compiled", "compiled in space") if sp == 2 else ()  # they take long
    compare(group, sp, [name for name in OPTIONS if name in compiled or "compiled" not in name], turn)


def check_two_ranks(group: Group, sp: int, folder: Path) -> None:
    """Compare each option replicated or sharded: with sp = 1 one of these, with sp = 2 the other one."""
    compare_all(group, sp, turn=sp)
    compare_bf16(sp)
    check_nonfinite_steps(sp)
    check_measurements(sp)
    check_memory(sp)
    check_resuming(sp, folder)
    check_failing_save(sp, folder / "refused")
    check_stop_signals()


def compare_bf16(sp: int) -> None:
    """Sharded and replicated weights give equal rounding; one process sums other terms."""
    mesh = mesh_of(sp)
    check(
        trainer(mesh, True, precision="bf16"),
        trainer(mesh, False, precision="bf16"),
        "bf16, sharded",
        1e-6,
        1e-5,
    )
    check(trainer(mesh, True, precision="bf16"), trainer(Mesh(), precision="bf16"), "bf16", 2e-2, 0.2)


def check_nonfinite_steps(sp: int) -> None:
    """A sample that is not finite on one rank makes all ranks skip the step."""
    for sharded in (False, True):
        one = trainer(mesh_of(sp), sharded)
        train(one)
        before = tensors(one)
        broken = batch(one.mesh, STEPS)
        if one.mesh.dp_rank == one.mesh.dp - 1:
            broken.latents[-1, :, -1] = float("nan")
        values = one.step(broken)
        assert values["skipped"] and values["grad_norm"] is None
        assert equal(tensors(one), before)
        assert not one.step(batch(one.mesh, STEPS))["skipped"]


def check_measurements(sp: int) -> None:
    """Validation loss and block norms equal those of one process."""
    alone = tiny_trainer(tiny_model(in_channels=3), ADAMW, block_norms_every=1)
    line = alone.step(tiny_batch(0))
    for sharded in (False, True):
        mesh = mesh_of(sp)
        one = tiny_trainer(
            tiny_model(in_channels=3), ADAMW, mesh, sharded, block_norms_every=1, micro_batch_size=1
        )
        found = one.step(tiny_batch(0, mesh=mesh))["block_norms"]
        for block, norms in line["block_norms"].items():
            assert found[block] == pytest.approx(norms, rel=1e-4, abs=1e-6), (block, sharded)
        before = tensors(one)
        assert measured(one) == pytest.approx(measured(alone), rel=1e-5)
        assert equal(tensors(one), before)


def check_memory(sp: int) -> None:
    """The bytes of all ranks add up to those of one process, and are divided evenly."""
    one = trainer(mesh_of(sp), True)
    train(one)
    one.accumulate(batch(one.mesh, 0))
    kept = [
        *one.parameters,
        *(p.grad for p in one.parameters),
        *one.ema.average.values(),
        *(value for name, value in one.optimizer.state_dict().items() if not name.endswith(".step")),
    ]
    mine = sum(tensor.to_local().nbytes for tensor in kept)  # type: ignore[union-attr]
    count = sum(p.numel() for p in one.parameters)
    total = float(average({"": torch.tensor(float(mine))})[""]) * one.mesh.world_size
    assert total == 20 * count  # weights, gradients, two moments and the average, in fp32
    assert mine == pytest.approx(total / one.mesh.world_size, rel=0.1)


def check_resuming(sp: int, folder: Path) -> None:
    """A checkpoint resumes with sharded or replicated weights, on two ranks or on one, whichever wrote it."""
    mesh = mesh_of(sp)
    for optimizer in (ADAMW, MUON):
        saved, again, copies, alone = (
            trainer(on, sharded, optimizer)
            for on, sharded in ((mesh, True), (mesh, True), (mesh, False), (Mesh(), False))
        )
        train(saved, range(2))
        where = write(saved, folder / optimizer.name / "sharded", 2)
        assert {path.name for path in (where / "ema").iterdir()} == {
            f"ema-0000{n}-of-00002.safetensors" for n in (1, 2)
        }
        model, used = load_transformer(where, read_meta(where), ema=True)
        average = {name: full_tensor(tensor) for name, tensor in saved.ema.state_dict().items()}
        assert used == "ema" and equal(dict(model.state_dict()), average)
        losses = check_resumed(saved, where, again, [copies, alone], range(2, 4))
        (folder / optimizer.name / "losses.json").write_text(json.dumps(losses))

        where = write(copies, folder / optimizer.name / "copies", 4)
        sizes = [sum(path.stat().st_size for path in where.glob(f"*/*-0000{n}-of-00002.*")) for n in (1, 2)]
        assert max(sizes) < 1.2 * min(sizes)  # each rank writes its part of the replicated state
        check_resumed(copies, where, trainer(mesh, False, optimizer), [saved], range(4, 6))

        if mesh.is_main:
            write(alone, folder / optimizer.name / "alone", 4)
        dist.barrier()
        again.read(
            folder / optimizer.name / "alone" / "step-00000004", {"nonfinite_in_a_row": 0, "batch_splits": 1}
        )
        check(again, alone, "resumed", 1e-5, 1e-4)


def check_resumed(
    saved: Trainer, where: Path, same: Trainer, others: list[Trainer], steps: range
) -> list[float]:
    """Resume a checkpoint: bit for bit on the same split, within 1e-5 on others. Return the losses."""
    for one in (same, *others):
        one.read(where, {"nonfinite_in_a_row": 0, "batch_splits": saved.batch_splits})
        assert equal(tensors(one), tensors(saved))
    expected = train(saved, steps)
    assert train(same, steps) == expected and equal(tensors(same), tensors(saved))
    for one in others:
        for values, other in zip(train(one, steps), expected, strict=True):
            assert values["loss"] == pytest.approx(other["loss"], rel=1e-5)
    return [values["loss"] for values in expected]


def check_failing_save(sp: int, folder: Path) -> None:
    """A disk error of one rank fails the save on all ranks, when they wait for it, and leaves no files."""
    one = trainer(mesh_of(sp), True)
    checkpoints, original = (
        CheckpointWriter(folder, CheckpointConfig(), one.mesh, 60),
        checkpoint_writer.write_chunks,
    )
    if one.mesh.rank == 1:
        checkpoint_writer.write_chunks = Mock(side_effect=OSError(28, "No space left on device"))
    checkpoints.save(1, one.state(), {})
    message = (
        "step-00000001 could not be written .*No space" if one.mesh.rank == 1 else "rank 1 failed: .*No space"
    )
    with pytest.raises(UserError if one.mesh.rank == 1 else OtherRankError, match=message):
        checkpoints.wait()
    checkpoint_writer.write_chunks = original
    dist.barrier()
    assert not list(folder.iterdir())
    verify(checkpoints.save(1, one.state(), {}, at_once=True))


def check_stop_signals() -> None:
    """A request to one rank stops all ranks after the same step."""
    mesh, signals, asked = mesh_of(1), StopSignals(), [False]
    exchange = StepExchange(mesh)
    exchange.register("flags", lambda: [*signals.flags(asked[0]), mesh.rank, 1 - mesh.rank, 0])
    *received, one, other, none = exchange.take("flags")
    signals.agree(received)
    assert [one, other, none] == [1, 1, 0] and signals.stop_signal is None
    asked[0] = mesh.is_main
    exchange.receive(exchange.reduce(torch.ones(2)).tolist()[2:])
    signals.agree(exchange.take("flags")[:-3])
    assert signals.stop_signal == signal.SIGTERM and signals.exit_code == 0


def check_more_ranks(group: Group, sp: int | tuple[int, int], names: list[str], saved: Path) -> None:
    """Compare the options, and resume a sharded checkpoint of two ranks, sharded and replicated."""
    compare(group, sp, names)
    for optimizer in (ADAMW, MUON):
        expected = json.loads((saved / optimizer.name / "losses.json").read_text())
        for sharded in (True, False):
            one = trainer(mesh_of(sp), sharded, optimizer)
            where = saved / optimizer.name / "sharded" / "step-00000002"
            one.read(where, {"nonfinite_in_a_row": 0, "batch_splits": 2})
            losses = [values["loss"] for values in train(one, range(2, 4))]
            assert losses == pytest.approx(expected, rel=1e-5)


def write(one: Trainer, folder: Path, step: int) -> Path:
    """Save a checkpoint as a run does, and wait for it."""
    checkpoints = CheckpointWriter(folder, CheckpointConfig(), one.mesh, 60)
    where = checkpoints.save(
        step, one.state(), {}, write_more=lambda folder: one.model.save_config(folder / "model")
    )
    checkpoints.wait()
    verify(where)
    return where


@pytest.fixture(scope="module")
def from_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all checks on two ranks that split the batch; return the folder of their checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    run_on_ranks(2, check_two_ranks, 1, folder)
    return folder


def test_every_option_on_two_ranks(from_two: Path) -> None:
    assert (from_two / "muon" / "losses.json").is_file()


@pytest.mark.slow
def test_every_option_on_two_ranks_that_share_videos(tmp_path: Path) -> None:
    run_on_ranks(2, check_two_ranks, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("sp", [1, 2])
def test_every_option_replicated_and_sharded(sp: int) -> None:
    run_on_ranks(2, compare_all, sp, None)


@pytest.mark.parametrize(
    "ranks, sp, names",
    [
        (4, 2, ["accumulation"]),
        pytest.param(4, (2, 2), ["accumulation", "joint and linear blocks in space"], marks=pytest.mark.slow),
        pytest.param(3, 3, ["AdamW", "Muon", "accumulation"], marks=pytest.mark.slow),
        pytest.param(
            4, (2, 2), ["compiled in space", "joint and temporal, compiled in space"], marks=pytest.mark.slow
        ),
    ],
)
def test_equals_one_process(ranks: int, sp: int | tuple[int, int], names: list[str], from_two: Path) -> None:
    run_on_ranks(ranks, check_more_ranks, sp, names, from_two)
