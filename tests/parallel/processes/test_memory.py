"""Memory that a process may use."""

from pathlib import Path

import psutil
import pytest
import torch

from stdit.parallel.processes import memory
from stdit.parallel.processes.memory import machine_memory, memory_of_process

CPU = torch.device("cpu")


def test_the_setting_wins() -> None:
    assert memory_of_process(CPU, 1.5) == 3 * 2**29


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_of_process(CPU, None) == machine_memory() // 4


@pytest.mark.parametrize("limit, expected", [("1000\n", 1000), ("max\n", None), (f"{2**70}\n", None)])
def test_a_container_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int | None
) -> None:
    (tmp_path / "limit").write_text(limit)
    monkeypatch.setattr(memory, "CONTAINER_LIMITS", (str(tmp_path / "limit"), str(tmp_path / "absent")))
    assert machine_memory() == (expected or psutil.virtual_memory().total)


@pytest.mark.gpu
def test_a_process_may_use_its_whole_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    assert memory_of_process(torch.device("cuda"), None) > 2**30
