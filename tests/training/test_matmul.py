from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stdit.models import matmul_rate as rate_module
from stdit.models.matmul_rate import matmul_precision, matmul_rate
from stdit.parallel.config import TrainingParallelConfig
from stdit.parallel.processes.mesh import Mesh, build_mesh
from stdit.parallel.sequence.group import Group
from stdit.training import matmul
from stdit.training.matmul import MatmulChoice, choose_precision, is_exact
from tests.parallel.ranks import run_on_ranks

CPU = torch.device("cpu")


def rounding_products(monkeypatch: pytest.MonkeyPatch, rounding: torch.dtype) -> None:
    """Make products with medium round to ``rounding``, on any machine."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        if a.dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest":
            return torch.mm(a, b)
        return torch.mm(a.to(rounding).double(), b.to(rounding).double()).float()

    monkeypatch.setattr(Tensor, "__matmul__", product)


def stopped_clock(monkeypatch: pytest.MonkeyPatch, module: Any) -> SimpleNamespace:
    """Give a module a clock that only tests move."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def passes(monkeypatch: pytest.MonkeyPatch, medium: float, highest: float) -> Any:
    """Return a pass that takes these seconds, and the list of precisions of its calls."""
    clock, calls = stopped_clock(monkeypatch, matmul), list[str]()

    def run() -> None:
        calls.append(torch.get_float32_matmul_precision())
        clock.now += medium if calls[-1] == "medium" else highest

    return run, calls


@pytest.mark.parametrize("rounding", [torch.bfloat16, torch.float32])
def test_products_are_exact_if_they_round_to_float32(
    rounding: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounding_products(monkeypatch, rounding)
    assert is_exact("highest", CPU)
    assert is_exact("medium", CPU) == (rounding == torch.float32)


@pytest.mark.parametrize(
    ("setting", "rounding", "medium", "highest", "precision", "exact"),
    [
        ("fastest_exact", torch.float32, 0.001, 0.01, "medium", True),
        ("fastest_exact", torch.float32, 0.01, 0.01, "highest", True),
        ("fastest_exact", torch.float32, 0.01, 0.001, "highest", True),
        ("fastest_exact", torch.bfloat16, 0.001, 0.01, "highest", True),
        ("fastest", torch.bfloat16, 0.001, 0.01, "medium", False),
        ("fastest", torch.float32, 0.001, 0.01, "medium", True),
        ("fastest", torch.bfloat16, 0.01, 0.001, "highest", True),
    ],
)
def test_the_faster_precision_is_chosen_by_measuring(
    setting: str,
    rounding: torch.dtype,
    medium: float,
    highest: float,
    precision: str,
    exact: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounding_products(monkeypatch, rounding)
    run, calls = passes(monkeypatch, medium, highest)
    choice, _ = choose_precision(setting, None, run, Mesh())
    assert choice == MatmulChoice(setting, precision, exact)
    assert torch.get_float32_matmul_precision() == "highest"
    if setting == "fastest_exact" and rounding == torch.bfloat16:
        assert not calls, "nothing to measure"
    else:
        assert calls.count("medium") == calls.count("highest") > 3


def test_a_resumed_run_keeps_its_choice_unless_the_machine_computes_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounding_products(monkeypatch, torch.bfloat16)
    run, calls = passes(monkeypatch, 0.01, 0.001)
    kept = MatmulChoice("fastest", "medium", exact=False)
    assert choose_precision("fastest", kept.state(), run, Mesh()) == (kept, "as before")
    slower = MatmulChoice("fastest", "highest", exact=True)
    assert choose_precision("fastest", slower.state(), run, Mesh()) == (slower, "as before")
    assert not calls
    exact = MatmulChoice("fastest_exact", "medium", exact=True)
    found, why = choose_precision("fastest_exact", exact.state(), run, Mesh())
    assert found == MatmulChoice("fastest_exact", "highest", exact=True)
    assert why.startswith("chosen anew, because medium, as before, rounded to float32, and does not here")
    rounding_products(monkeypatch, torch.float32)
    found, why = choose_precision("fastest", kept.state(), run, Mesh())
    assert found == MatmulChoice("fastest", "highest", exact=True)
    assert why.startswith(
        "chosen anew, because medium, as before, rounded to less than float32, and does not here"
    )


def test_the_rate_is_that_of_matrix_products_of_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen = stopped_clock(monkeypatch, rate_module), set()
    seconds = cycle([0.05, 0.04, 0.02, 0.03, 0.04, 0.05])

    def product(a: Tensor, b: Tensor) -> Tensor:
        seen.add((a.dtype, torch.get_float32_matmul_precision()))
        clock.now += next(seconds)
        return a

    monkeypatch.setattr(Tensor, "__matmul__", product)
    assert matmul_rate(CPU, torch.bfloat16) == pytest.approx(2 * 1024**3 / 0.02)
    matmul_rate(CPU, torch.float32, "medium")
    assert seen == {(torch.bfloat16, "highest"), (torch.float32, "medium")}
    with matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"


def check_ranks_agree(group: Group) -> None:
    mesh = build_mesh(TrainingParallelConfig(), CPU)
    with pytest.MonkeyPatch.context() as patch:
        faster_on_main, _ = passes(patch, *((0.001, 0.01) if mesh.is_main else (0.01, 0.001)))
        choice, reason = choose_precision("fastest", None, faster_on_main, mesh)
        assert choice.precision == "medium", reason
        rounding_products(patch, torch.float32 if mesh.is_main else torch.bfloat16)
        assert is_exact("medium", CPU) == mesh.is_main
        choice, _ = choose_precision("fastest_exact", None, faster_on_main, mesh)
        assert choice.precision == "highest"


def test_ranks_make_the_same_choice() -> None:
    run_on_ranks(2, check_ranks_agree)
