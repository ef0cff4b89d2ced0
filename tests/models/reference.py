"""STDiT3 in plain code, one sample at a time: the reference where there are no tensors of the original.

Letters: T frames, S patches of a frame, D width, L text tokens, h heads, d channels of a head.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import conv3d, gelu, layer_norm, linear, pad, silu

State = dict[str, Tensor]


def stdit3(
    w: State,
    x: Tensor,
    timestep: Tensor,
    y: Tensor,
    mask: Tensor | None,
    fps: Tensor,
    height: Tensor,
    width: Tensor,
) -> Tensor:
    """``x [B C T H W]``, ``timestep [B T]``, ``y [B L E]``, ``mask [B L]``, the rest ``[B]`` -> ``[B C_out T H W]``.

    All in float64.
    """
    samples = []
    for b in range(len(x)):
        states = y[b] if mask is None else y[b][mask[b].bool()]
        samples.append(one(w, x[b], timestep[b], states, fps[b], float(height[b] * width[b]) ** 0.5))
    return torch.stack(samples)


def one(w: State, x: Tensor, timestep: Tensor, y: Tensor, fps: Tensor, side: float) -> Tensor:
    """``x [C T H W]``; ``side`` is the root of the area in pixels."""
    _, T, H, W = x.shape
    x = pad(x, (0, W % 2, 0, H % 2))
    x = conv3d(x[None], w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=(1, 2, 2))[
        0
    ]  # [D T H' W']
    D, _, rows, columns = x.shape
    x = x.permute(1, 2, 3, 0).flatten(1, 2) + positions(rows, columns, D, side)  # [T S D]

    fps_states = mlp_of(w, "fps_embedder.mlp", "0", "2", waves(fps[None], 256), silu)
    t = mlp_of(w, "t_embedder.mlp", "0", "2", waves(timestep, 256), silu) + fps_states  # [T D]
    modulation = linear(silu(t), w["t_block.1.weight"], w["t_block.1.bias"]).unflatten(-1, (6, D))  # [T 6 D]
    y = mlp_of(w, "y_embedder.y_proj", "fc1", "fc2", y, tanh_gelu)  # [L D]

    depth = 1 + max(int(key.split(".")[1]) for key in w if key.startswith("spatial_blocks."))
    for i in range(depth):
        x = block(w, f"spatial_blocks.{i}.", x, y, modulation, temporal=False)
        x = block(w, f"temporal_blocks.{i}.", x, y, modulation, temporal=True)

    shift, scale = (w["final_layer.scale_shift_table"] + t[:, None]).unbind(1)  # [T D] each
    x = linear(modulated(x, shift, scale), w["final_layer.linear.weight"], w["final_layer.linear.bias"])
    x = x.unflatten(1, (rows, columns)).unflatten(-1, (2, 2, -1))  # [T H' W' 2 2 C_out]
    return x.permute(5, 0, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)[:, :, :H, :W]


def block(w: State, name: str, x: Tensor, y: Tensor, modulation: Tensor, temporal: bool) -> Tensor:
    table = w[name + "scale_shift_table"] + modulation
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = table.unbind(1)
    m = modulated(x, shift_a, scale_a)
    rows = m.transpose(0, 1) if temporal else m
    m = self_attention(w, name + "attn.", rows, rotary=temporal)
    m = m.transpose(0, 1) if temporal else m
    x = x + gate_a[:, None] * m
    x = x + cross_attention(w, name + "cross_attn.", x, y)
    m = mlp_of(w, name + "mlp", "fc1", "fc2", modulated(x, shift_m, scale_m), tanh_gelu)
    return x + gate_m[:, None] * m


def self_attention(w: State, name: str, x: Tensor, rotary: bool) -> Tensor:
    """Self-attention among the N tokens of each row of ``x [R N D]``."""
    qkv = linear(x, w[name + "qkv.weight"], w[name + "qkv.bias"])
    d = len(w[name + "q_norm.weight"])
    q, k, v = (part.unflatten(-1, (-1, d)).transpose(1, 2) for part in qkv.chunk(3, -1))  # [R h N d]
    q, k = rms(q) * w[name + "q_norm.weight"], rms(k) * w[name + "k_norm.weight"]
    if rotary:
        q, k = turned(q), turned(k)
    return linear(attend(q, k, v).transpose(1, 2).flatten(2), w[name + "proj.weight"], w[name + "proj.bias"])


def cross_attention(w: State, name: str, x: Tensor, y: Tensor) -> Tensor:
    """Cross-attention of every token of ``x [T S D]`` to the text ``y [L D]``."""
    d = len(w[name.replace("cross_attn", "attn") + "q_norm.weight"])
    q = linear(x, w[name + "q_linear.weight"], w[name + "q_linear.bias"])
    k, v = linear(y, w[name + "kv_linear.weight"], w[name + "kv_linear.bias"]).chunk(2, -1)
    q, k, v = (part.unflatten(-1, (-1, d)).transpose(-3, -2) for part in (q, k, v))  # [.. h N d]
    return linear(
        attend(q, k, v).transpose(-3, -2).flatten(-2), w[name + "proj.weight"], w[name + "proj.bias"]
    )


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def turned(x: Tensor) -> Tensor:
    """Rotary positions: adjacent channels as complex numbers, turned by frame / 10000^(2 i / d)."""
    N, d = x.shape[-2:]
    angle = torch.arange(N)[:, None] / 10000 ** (torch.arange(0, d, 2).double() / d)
    turn = torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x [T S D]``, shift and scale ``[T D]``."""
    return layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def mlp_of(w: State, name: str, first: str, second: str, x: Tensor, activation) -> Tensor:  # type: ignore[no-untyped-def]
    x = activation(linear(x, w[f"{name}.{first}.weight"], w[f"{name}.{first}.bias"]))
    return linear(x, w[f"{name}.{second}.weight"], w[f"{name}.{second}.bias"])


def tanh_gelu(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


def waves(x: Tensor, width: int) -> Tensor:
    """Cosines, then sines, ``[N width]``; angles reach 1000, so that their rounding in float32 shows: it is kept."""
    half = width // 2
    angle = x.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
    return torch.cat([angle.cos(), angle.sin()], -1).double()


def positions(rows: int, columns: int, D: int, side: float) -> Tensor:
    """``[S D]``: half of the channels from the column, half from the row; each sines, then cosines."""
    base = round(math.sqrt(rows * columns))
    down = torch.arange(rows, dtype=torch.float64) / (side / 512) * base / rows
    across = torch.arange(columns, dtype=torch.float64) / (side / 512) * base / columns
    row, column = torch.meshgrid(down, across, indexing="ij")
    frequency = 10000 ** (-torch.arange(D // 4, dtype=torch.float64) / (D // 4))
    parts = [
        wave(place.reshape(-1, 1) * frequency) for place in (column, row) for wave in (torch.sin, torch.cos)
    ]
    return torch.cat(parts, -1)
