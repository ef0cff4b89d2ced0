"""STDiT against the reference tensors of Open-Sora v1.2: eager, in bf16, compiled, and on two ranks."""

import pytest
import torch
from torch import Tensor

from stdit.models.stdit import STDiT
from stdit.parallel.group import Group
from tests.models.golden import GOLDEN, golden, weights
from tests.parallel.ranks import run_on_ranks


def generated_frames(tensors: dict[str, Tensor]) -> Tensor:
    """True where a frame is made, ``[B T]``: given ones are compared by nobody."""
    x = tensors["in.x"]
    return tensors.get("in.x_mask", torch.ones(x.shape[0], x.shape[2], dtype=torch.bool))


def condition(tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """All inputs but the latents."""
    return {
        "timestep": tensors["in.timestep"][:, None] * generated_frames(tensors),
        "encoder_hidden_states": tensors["in.y"][:, 0],
        "encoder_attention_mask": tensors.get("in.mask"),
        **{name: tensors[f"in.{name}"] for name in ("fps", "height", "width")},
    }


def check(
    model: STDiT, tensors: dict[str, Tensor], out: Tensor, grad_x: Tensor, atol: float, share: float
) -> None:
    """Output within ``atol``, and each gradient within a share of its largest element."""
    free = generated_frames(tensors)[:, None, :, None, None]
    torch.testing.assert_close(out * free, tensors["out"] * free, atol=atol, rtol=0)
    found = {"x": grad_x, **{name: p.grad for name, p in model.named_parameters()}}
    gradients = {key[5:]: value for key, value in tensors.items() if key.startswith("grad.")}
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=share * float(gradient.abs().max()), rtol=0)


def run(model: STDiT, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the input of the mean square of what is made."""
    x = tensors["in.x"].requires_grad_()
    out = model(hidden_states=x, **condition(tensors))
    (out.float() * generated_frames(tensors)[:, None, :, None, None]).square().mean().backward()
    assert x.grad is not None
    return out, x.grad


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_open_sora(case: str, checkpointing: bool) -> None:
    tensors = golden(case)
    model = STDiT.from_opensora(weights(tensors))
    if checkpointing:
        model.enable_gradient_checkpointing()
    check(model, tensors, *run(model, tensors), atol=1e-5, share=1e-5)


@pytest.mark.parametrize("case", GOLDEN)
def test_in_bf16(case: str) -> None:
    """The error of the output is at most 2% of it, root mean squares both."""
    tensors = golden(case)
    model = STDiT.from_opensora(weights(tensors))
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = run(model, tensors)
    free = generated_frames(tensors)[:, None, :, None, None]
    error = ((out.float() - tensors["out"]) * free).square().mean().sqrt()
    assert error <= 2e-2 * (tensors["out"] * free).square().mean().sqrt()


@pytest.mark.parametrize("case, backend", [(case, "aot_eager") for case in GOLDEN])
def test_compiled(case: str, backend: str) -> None:
    tensors = golden(case)
    model = STDiT.from_opensora(weights(tensors))
    model.compile_blocks(backend=backend, fullgraph=True)
    check(model, tensors, *run(model, tensors), atol=1e-4, share=1e-4)


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    test_compiled("pad_xmask", "inductor")


def on_ranks(group: Group) -> None:
    for case in GOLDEN:
        tensors = golden(case)
        model = STDiT.from_opensora(weights(tensors))
        x = tensors["in.x"].requires_grad_()
        shards = model.shards(group, *x.shape[2:])
        out = model(hidden_states=shards.split(x, 2), **condition(tensors), shards=shards)
        free = generated_frames(tensors)[:, None, :, None, None]
        whole = out * shards.split(free, 2)
        (whole.square().sum() / tensors["out"].numel()).backward()
        for value in (x, *model.parameters()):
            if value.grad is not None:
                torch.distributed.all_reduce(value.grad)
        assert x.grad is not None
        check(model, tensors, shards.gather(out, 2, x.shape[2]), x.grad, atol=1e-5, share=1e-5)


def test_on_two_ranks() -> None:
    run_on_ranks(2, on_ranks)
