"""Attention by matrix products and by PyTorch's kernels, also where a caption has no visible token."""

import pytest
import torch
from torch import Tensor

from stdit.models import attention as module
from stdit.models.attention import LinearAttention, attention
from stdit.models.embeddings import joint_angles, rotate
from stdit.models.stdit import STDiT, masked_mean
from stdit.parallel.sequence.layouts import Span

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


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_is_that_of_its_kernel(causal: bool) -> None:
    """Weights are products of features, turned by their positions, over the sum of the products as they are."""
    torch.manual_seed(0)
    (B, T, S, h, d), tokens = (2, 3, 4, 2, 6), 12
    layer = LinearAttention(h * d, h, qk_norm=True, causal=causal).double()
    x = torch.randn(B, T, S, h * d, dtype=torch.float64)
    angles = joint_angles(Span(0, T), Span(0, S), 2, d, x.device)
    q, k, v = layer.qkv(x).view(B, tokens, 3, h, d).permute(2, 0, 3, 1, 4)  # each [B h tokens d]
    q, k = layer.q_norm(q).relu(), layer.k_norm(k).relu()
    frame = torch.arange(tokens) // S
    seen = frame[:, None] >= frame if causal else torch.ones(tokens, tokens, dtype=torch.bool)
    turned = [rotate(each, angles.flatten(0, 1)) for each in (q, k)]
    weights = turned[0] @ turned[1].mT * seen / (1 + (q @ k.mT * seen).sum(-1, keepdim=True))
    expected = layer.proj((weights @ v).transpose(1, 2).reshape(B, T, S, h * d))
    torch.testing.assert_close(layer(x, angles), expected)


def test_causal_linear_attention_can_stream() -> None:
    """Frames see the sum of the states of earlier ones, whose size does not grow: no later frame changes them."""
    torch.manual_seed(0)
    layer = LinearAttention(12, 2, qk_norm=True, causal=True).double()
    x = torch.randn(2, 5, 4, 12, dtype=torch.float64)
    angles = joint_angles(Span(0, 5), Span(0, 4), 2, 6, x.device)
    whole = layer(x, angles)
    carried = torch.zeros(())

    class Stream:
        def sum_states(self, states: Tensor, causal: bool) -> Tensor:
            nonlocal carried
            assert causal and states.shape == (1, 2, 2, 6, 7)
            carried = carried + states
            return carried

    frames = [layer(x[:, t : t + 1], angles[t : t + 1], Stream()) for t in range(5)]
    torch.testing.assert_close(torch.cat(frames, 1), whole)


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
