"""Precision of products of float32 matrices: which one a training uses."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from stdit.models.matmul_rate import matmul_precision
from stdit.parallel.processes.mesh import Mesh

MEASUREMENTS = 5
"""Pairs of passes that are timed for a choice, after one pair that is not."""
GAIN = 0.95
"""medium must take at most this share of the time of highest."""


@dataclass(frozen=True)
class MatmulChoice:
    """A precision that a run has chosen; kept in its checkpoints, since another one would round otherwise."""

    setting: str
    """``trainer.matmul_precision``: fastest or fastest_exact."""
    precision: str
    """highest or medium, of `torch.set_float32_matmul_precision`."""
    exact: bool
    """Whether products of this precision round to float32 where it was chosen."""

    def state(self) -> dict[str, Any]:
        """Return what the manifest of a checkpoint holds."""
        return asdict(self)


def is_exact(precision: str, device: torch.device) -> bool:
    """Return whether products of float32 matrices round to float32: not to bfloat16 (error 2e-3) or TF32 (3e-4)."""
    a, b = torch.rand(2, 256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    with matmul_precision(precision):
        product = (a @ b).cpu().double()
    exact = a.cpu().double() @ b.cpu().double()
    return bool((product - exact).norm() <= 1e-6 * exact.norm())


def choose_precision(
    setting: str, kept: dict[str, Any] | None, run: Callable[[], object], mesh: Mesh
) -> tuple[MatmulChoice, str]:
    """Choose the precision of a run, the same on all ranks, which must all call this.

    Args:
        setting: fastest_exact (medium must round to float32) or fastest (medium may round to bfloat16 or TF32).
        kept: state of the choice in the checkpoint that the run resumes from, which it keeps where it can.
        run: a forward and backward pass, done when it returns; called several times.

    Returns:
        the choice, and the reason for it, in words.
    """
    why = ""
    if kept is not None:
        before = MatmulChoice(**kept)
        if _exact_on_all(before.precision, mesh) == before.exact:
            return before, "as before"
        rounds = "to float32" if before.exact else "to less than float32"
        why = f"chosen anew, because {before.precision}, as before, rounded {rounds}, and does not here: "
    exact = _exact_on_all("medium", mesh)
    if setting == "fastest_exact" and not exact:
        return MatmulChoice(setting, "highest", True), f"{why}medium does not round to float32 here"
    own = _time_ratio(run)
    ratio = mesh.on_main(lambda: own)
    medium = ratio <= GAIN
    reason = (
        f"{why}medium takes {ratio:.2f} of its time"
        if not medium
        else f"{why}{ratio:.2f} of the time of highest"
    )
    return MatmulChoice(setting, "medium" if medium else "highest", exact or not medium), reason


def _exact_on_all(precision: str, mesh: Mesh) -> bool:
    return all(mesh.all_gather_objects(is_exact(precision, mesh.device)))


def _time_ratio(run: Callable[[], object]) -> float:
    """Return the time of ``run`` with medium as a share of that with highest: the median of alternating pairs."""

    def seconds(precision: str) -> float:
        began = time.perf_counter()
        with matmul_precision(precision):
            run()
        return time.perf_counter() - began

    ratios = []
    for number in range(1 + MEASUREMENTS):
        order = ("medium", "highest") if number % 2 else ("highest", "medium")
        took = {precision: seconds(precision) for precision in order}
        ratios.append(took["medium"] / took["highest"])
    return statistics.median(ratios[1:])
