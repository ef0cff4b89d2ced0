"""What ranks exchange in a training step, and how often the CPU waits for the device."""

import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from stdit.data.batch import EncodedBatch
from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.processes.step_exchange import StepExchange
from stdit.parallel.sequence.group import Group
from stdit.training import session as session_module
from stdit.training.config import parse_train
from stdit.training.stop_signals import stop_signals
from stdit.training.trainer import Trainer
from tests.parallel.ranks import run_on_ranks
from tests.training.tiny import tiny_settings
from train import loop


def test_a_step_costs_one_collective_and_one_wait_for_the_device(tmp_path: Path) -> None:
    """Besides gradients and what the model sends."""
    tiny_settings(tmp_path)
    run_on_ranks(2, train_and_count, tmp_path)


def train_and_count(group: Group, folder: Path) -> None:
    flags = ["--name", "exchange", "--checkpoint.every", "100", "--trainer.steps", "5"]
    config = parse_train(["--config", str(folder / "tiny.yaml"), *flags])
    found: dict[str, list[int]] = {"collectives": [], "reads": []}
    counts = dict.fromkeys(found, 0)
    step = Trainer.step

    def counted(kind: str, function: Callable[..., Any], folders: str = "") -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            counts[kind] += bool(re.search(folders, sys._getframe(1).f_code.co_filename))
            return function(*args, **options)

        return call

    def stepping(self: Trainer, batch: EncodedBatch) -> dict[str, Any]:
        for kind, numbers in found.items():
            numbers.append(counts[kind])
        return step(self, batch)

    AcceleratorState._reset_state(True)
    watchdog = session_module.build_watchdog(Mesh(), config.parallel)  # of one process: it needs no torchrun
    with pytest.MonkeyPatch.context() as patch, stop_signals() as signals, ExitStack() as stack:
        patch.setattr(session_module, "build_watchdog", lambda *_: watchdog)
        session = stack.enter_context(session_module.start(config, signals))
        for name in ("all_reduce", "all_gather_object", "broadcast_object_list", "gather_object", "barrier"):
            patch.setattr(dist, name, counted("collectives", getattr(dist, name)))
        for name in ("tolist", "item", "__float__", "__bool__"):
            function = getattr(torch.Tensor, name)
            patch.setattr(torch.Tensor, name, counted("reads", function, "stdit/(training|parallel)/"))
        patch.setattr(Trainer, "step", stepping)
        assert loop(session) == 0
    for kind, numbers in found.items():
        assert [after - before for before, after in pairwise(numbers)] == [1] * 4, kind


def test_numbers_are_summed_with_the_loss_and_taken_once() -> None:
    run_on_ranks(2, exchange)


def exchange(group: Group) -> None:
    one, polled = StepExchange(Mesh(group.rank, group.size)), [0]

    def poll() -> list[int]:
        polled[0] += 1
        return [group.rank, 3]

    one.register("a", poll)
    one.register("b", lambda: [1 - group.rank])
    for _ in range(2):
        vector = one.reduce(torch.tensor([0.5 + group.rank, float("nan")]))
        assert vector[0] == 2 and vector[1].isnan()
        one.receive(vector[2:].tolist())
        assert (one.take("a"), one.take("b")) == ([1, 6], [1])
    assert polled == [2]
    assert one.take("a") == [1, 6] and polled == [3], "nothing was exchanged since"
    one.discard("b")
    assert one.take("b") == [1] and polled == [4]


def test_one_process_polls_when_numbers_are_taken() -> None:
    one, numbers = StepExchange(Mesh()), [1]
    one.register("a", lambda: numbers)
    assert one.reduce(torch.ones(1)).tolist() == [1]
    numbers[0] = 5
    assert one.take("a") == [5]
