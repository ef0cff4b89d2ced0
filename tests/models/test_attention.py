"""Attention by matrix products and by PyTorch's kernels, also where a caption has no visible token."""

import pytest
import torch
from torch import Tensor

from stdit.models import attention as module
from stdit.models.attention import attention
from stdit.models.stdit import STDiT, masked_mean

VISIBLE = torch.tensor([[True, True, False], [False, False, False]])
PATHS = pytest.mark.parametrize("few", [4096, 0], ids=["products", "kernel"])


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


@PATHS
def test_attention_to_no_token_is_zero_and_has_no_gradient(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEW_SCORES", few)
    q, k, v = rows(2, 2, 5, 8), rows(2, 2, 3, 8), rows(2, 2, 3, 4 + 4)
    out = attention(q, k, v, VISIBLE[:, None, None])
    assert torch.equal(out[1], torch.zeros(2, 5, 8))
    seen = attention(q[:1], k[:1, :, :2], v[:1, :, :2])
    torch.testing.assert_close(out[:1], seen)
    out.square().sum().backward()
    for tensor in (q, k, v):
        assert tensor.grad is not None and tensor.grad.isfinite().all()
        assert not tensor.grad[1].any() and tensor.grad[0].any()


def test_the_mean_of_no_token_is_zero() -> None:
    states = rows(2, 3, 4)
    mean = masked_mean(states, VISIBLE)
    torch.testing.assert_close(mean, torch.stack([states[0, :2].mean(0), torch.zeros(4)]))
    mean.sum().backward()
    assert states.grad is not None and states.grad.isfinite().all() and not states.grad[1].any()


@PATHS
def test_padding_of_a_caption_without_a_visible_token_has_no_effect(
    few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FEW_SCORES", few)
    torch.manual_seed(0)
    model = STDiT(
        depth=1,
        hidden_size=16,
        num_heads=2,
        caption_channels=6,
        model_max_length=3,
        gate_init=0.5,
        pooled_text=True,
    )
    torch.nn.init.normal_(model.final_layer.linear.weight)
    sizes = {name: torch.full((2,), 8.0) for name in ("fps", "height", "width")}
    x, t = rows(2, 4, 2, 4, 4), torch.tensor([300.0, 700.0])
    text = rows(2, 3, 6)
    out = model(x, t, text, VISIBLE, **sizes).sample
    other = model(x, t, torch.where(VISIBLE[..., None], text, 7.0), VISIBLE, **sizes).sample
    assert out.isfinite().all()
    torch.testing.assert_close(out, other)
    out.square().mean().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
