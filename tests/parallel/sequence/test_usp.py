"""Attention to some of the keys, as a ring computes it, by each of the kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stdit.parallel.sequence import usp
from stdit.parallel.sequence.stages import ulysses_size

KERNELS = [
    (usp.attention_and_lse, usp.attention_backward),
    (usp.plain_attention, usp.plain_attention_backward),
]


@pytest.mark.parametrize("forward, backward", KERNELS, ids=("of the device", "plain"))
def test_attention_in_two_parts_is_that_to_all_keys(
    forward: Callable[..., Any], backward: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 8, dtype=torch.float64)
    for each in (q, k, v):
        each.requires_grad_()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    grad = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (q, k, v), grad)
    q, k, v = (each.detach() for each in (q, k, v))
    parts = [forward(q, k[:, :, part], v[:, :, part]) for part in (slice(0, 3), slice(3, 7))]
    lse = torch.logaddexp(*(lse for _, lse in parts))
    out = sum(part * (own - lse).exp()[..., None] for part, own in parts)
    torch.testing.assert_close(out, expected.detach())
    found = [backward(grad, q, k[:, :, part], v[:, :, part], out, lse) for part in (slice(0, 3), slice(3, 7))]
    torch.testing.assert_close(found[0][0] + found[1][0], gradients[0])
    for index in (1, 2):
        torch.testing.assert_close(
            torch.cat([found[0][index], found[1][index]], 2), gradients[index], msg="kv"
        )


def test_autocast_does_not_round_the_scores() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = usp.plain_attention(q, k, v)
        grads = usp.plain_attention_backward(torch.ones_like(out), q, k, v, out, lse)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert all(grad.dtype == torch.float32 for grad in grads)
    torch.testing.assert_close(lse, usp.plain_attention(q.float(), k.float(), v.float())[1])


@pytest.mark.parametrize(
    "ranks, heads, expected", [(4, 16, 4), (8, 6, 4), (6, 4, 3), (5, 4, 1), (3, 1, 1), (12, 7, 6)]
)
def test_ulysses_takes_the_largest_part_with_a_head_for_each_rank(
    ranks: int, heads: int, expected: int
) -> None:
    assert ulysses_size(ranks, heads) == expected
