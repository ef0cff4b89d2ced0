"""The baselines against one process, on weights without zeros, and the bytes that each of them sends."""

from typing import Any

import pytest
import torch

from scripts.bench.baselines import BASELINES, apply_baseline
from stdit.errors import UserError
from stdit.parallel.sequence.group import Group
from tests.parallel.ranks import run_on_ranks
from tests.parallel.sequence.test_sharding import compare_with, make_batch, make_model, run, run_alone

CASES: dict[str, dict[str, Any]] = {
    "nothing divides": {"frames": 7, "batch": 3, "num_heads": 5, "hidden_size": 20, "mlp_ratio": 0.7},
    "one clip, paired, checkpointing": {"frames": 6, "blocks": "S T T S", "checkpointing": True},
    "conditioning frames": {
        "frames": 5,
        "batch": 3,
        "conditioning": True,
        "cross_attention": "spatial",
        "pooled_text": True,
    },
    "patches of two frames": {
        "frames": 9,
        "patch_size": (2, 2, 2),
        "frame_positions": True,
        "qk_norm": False,
    },
}


def compare(group: Group, method: str, name: str, **settings: Any) -> None:
    case = {
        "batch": 1,
        "conditioning": False,
        "checkpointing": False,
        "num_heads": 4,
        "depth": 2,
        **CASES[name],
        **settings,
    }
    sizes = (case.pop("frames"), 5, 6)
    batch = make_batch(*sizes, case.pop("batch"), case.pop("conditioning"), torch.float64)
    checkpointing = case.pop("checkpointing")
    whole, sharded = make_model(torch.float64, **case), make_model(torch.float64, **case)
    if checkpointing:
        sharded.enable_gradient_checkpointing()
    sharding = apply_baseline(sharded, method, sharded.token_sharding(group, *sizes))
    compare_with(run_alone(whole, batch), sharded, sharding, batch, 1e-12, f"{method}, {name}")


def compare_all(group: Group) -> None:
    for name in CASES:
        for method in BASELINES:
            if method != "lasp-ring":
                compare(group, method, name)
        for causal in (False, True):
            compare(group, "lasp-ring", name, blocks="S L", linear_causal=causal)
    assert bool(group.traffic.calls) == (group.size > 1)


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 4))])
def test_equals_one_process(ranks: int) -> None:
    run_on_ranks(ranks, compare_all)


PAIRS, BATCH, FRAMES, ROWS, COLUMNS, DIM, HEADS = 2, 2, 8, 4, 8, 16, 4
M = 4 * BATCH * FRAMES * (ROWS // 2) * (COLUMNS // 2) * DIM  # bytes; the output, 4 x 2 x 2 values, is as wide


def traffic(group: Group, method: str, checkpointing: bool, **settings: Any) -> dict[str, int]:
    """Return the bytes that a rank sends in forward and backward, by collective; all sizes divide."""
    model = make_model(
        torch.float32, depth=PAIRS, num_heads=HEADS, hidden_size=DIM, pred_sigma=False, **settings
    )
    if checkpointing:
        model.enable_gradient_checkpointing()
    sharding = model.token_sharding(group, FRAMES, ROWS, COLUMNS)
    if method != "dsp":
        sharding = apply_baseline(model, method, sharding)
    group.traffic.clear()
    run(model, sharding, *make_batch(FRAMES, ROWS, COLUMNS, BATCH, False, torch.float32))
    return dict(group.traffic.bytes)


def count_all(group: Group) -> None:
    unit = PAIRS * M * (group.size - 1) // group.size
    for checkpointing in (False, True):
        repeated = int(checkpointing)  # what activation checkpointing sends again
        dsp = traffic(group, "dsp", checkpointing)
        assert dsp == {"all_to_all": 2 * 2 * unit // group.size}
        paired = traffic(group, "dsp", checkpointing, blocks="S T T S")
        assert paired == {"all_to_all": dsp["all_to_all"] // 2}, "half"
        for method, exchanges in (("ulysses", 4), ("usp", 8), ("ulysses-all", 8)):
            sent = traffic(group, method, checkpointing)
            assert sent == {"all_to_all": (2 + repeated) * exchanges * unit // group.size}, method
        assert dsp["all_to_all"] <= 0.25 * sent["all_to_all"], "a quarter of ulysses-all at most"
        assert traffic(group, "ring", checkpointing) == {"ring": (1 + 2 + repeated) * 2 * unit}
        each = (2 + repeated) * 4 * unit
        assert traffic(group, "megatron", checkpointing) == {"all_gather": each, "reduce_scatter": each}
        state = 4 * BATCH * DIM * (DIM // HEADS + 1)
        ring = traffic(group, "lasp-ring", checkpointing, blocks="S L")
        assert ring == {"ring": (2 + repeated) * PAIRS * (group.size - 1) * state}
        at_once = traffic(group, "dsp", checkpointing, blocks="S L")
        assert at_once["sum_over"] == ring["ring"], "as LASP-2, in fewer calls"


def test_traffic_is_that_of_the_formulas() -> None:
    run_on_ranks(4, count_all)


@pytest.mark.parametrize(
    "method, ranks, settings, message",
    [
        ("ulises", 2, {}, "must be one of ulysses, ulysses-all, usp, ring, megatron, lasp-ring"),
        ("ring", 4, {}, "4 ranks, but there are 3 frames.* use at most 3 ranks"),
        ("megatron", 3, {}, "3 ranks, but the model has 2 heads.* use at most 2 ranks"),
        ("ulysses", 2, {"mlp_conv": True}, "leave mlp_conv out"),
        ("usp", 2, {"blocks": "S J L"}, "no way to share blocks of kind J, L, only S and T: leave them out"),
        ("lasp-ring", 2, {}, "no way to share blocks of kind T, only S and L"),
    ],
)
def test_unsupported_models_and_sizes_are_errors(
    method: str, ranks: int, settings: dict[str, Any], message: str
) -> None:
    model = make_model(torch.float32, **settings)
    with pytest.raises(UserError, match=message):
        apply_baseline(model, method, model.token_sharding(Group(0, ranks), 3, 4, 4))
