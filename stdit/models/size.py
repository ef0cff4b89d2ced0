"""Count the parameters and the work of a model without allocating it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from math import prod

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stdit.errors import UserError
from stdit.models.config import STDiTConfig, token_grid
from stdit.models.stdit import STDiT
from stdit.parallel.sequence.planner import FLOAT32_BYTES, Saved, Workload


def batch_load(
    config: STDiTConfig,
    latent_shape: Sequence[int],
    clips: int,
    element_size: int = FLOAT32_BYTES,
    micro_batch_size: int | None = None,
    saved: tuple[Saved, ...] | Saved = "keep",
) -> Workload:
    """Return the workload of a model with a batch of clips whose latents are (T, H, W); see `Workload`."""
    return Workload(
        clips,
        *token_grid(latent_shape, config.patch_size),
        width=config.hidden_size,
        kinds=config.kinds,
        head_size=config.hidden_size // config.num_heads,
        columns=-(-latent_shape[2] // config.patch_size[2]),
        out_features=prod(config.patch_size) * config.out_channels,
        element_size=element_size,
        micro_batch_size=micro_batch_size,
        saved=saved,
        convolves=config.mlp_conv,
        causal=config.linear_causal,
    )


def parameter_count(model: nn.Module) -> int:
    """Return the number of weights of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def tensor_bytes(*modules: nn.Module) -> int:
    """Return the bytes of all weights and buffers of modules."""
    return sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())


def count_on_meta(config: STDiTConfig, count: Callable[[STDiT], int] = parameter_count) -> int:
    """Return ``count`` of a model of any depth, from that of a few blocks, since all of a kind are equal.

    Raises:
        UserError: if a single weight would have more bytes than torch can count.
    """
    kinds = config.kinds
    few = "".join(sorted(set(kinds)) * 2)

    def count_few(kinds: str) -> int:
        return count(meta_model(replace(config, depth=len(kinds) // 2, blocks=kinds)))

    try:
        base = count_few(few)
        more = {kind: count_few(few + 2 * kind) - base for kind in set(kinds)}  # of two such blocks
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise UserError(
            f"a weight of this model would exceed 2^63 bytes: lower model.hidden_size = {config.hidden_size}, "
            f"model.mlp_ratio = {config.mlp_ratio:g}, or model.patch_size = {list(config.patch_size)}"
        ) from None
    return base + sum((kinds.count(kind) - 2) * two for kind, two in more.items()) // 2


def training_flops(
    config: STDiTConfig,
    clips: int,
    latent_shape: Sequence[int],
    text_tokens: int,
    frame_timesteps: bool = False,
) -> int:
    """Return the floating-point operations of a forward and backward pass, as torch counts them.

    These are matrix products, attention and convolutions, without what activation checkpointing computes again.

    Args:
        clips: of the batch.
        latent_shape: (T, H, W) of the latents of a clip.
        text_tokens: of the longest caption.
        frame_timesteps: whether every latent frame has a timestep of its own (conditioning frames).
    """
    inputs = {
        "hidden_states": torch.empty(clips, config.in_channels, *latent_shape, device="meta"),
        "timestep": torch.empty(clips, latent_shape[0] if frame_timesteps else 1, device="meta"),
        "encoder_hidden_states": torch.empty(clips, text_tokens, config.caption_channels, device="meta"),
        "encoder_attention_mask": torch.ones(clips, text_tokens, dtype=torch.bool, device="meta"),
        "drop_caption": torch.zeros(clips, dtype=torch.bool, device="meta"),
        **{name: torch.empty(clips, device="meta") for name in ("fps", "height", "width")},
    }
    if config.guidance_range is not None:
        inputs["guidance"] = torch.empty(clips, device="meta")

    def count(model: STDiT) -> int:
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            model(**inputs).sample.sum().backward()
        return int(counter.get_total_flops())

    return count_on_meta(config, count)


def meta_model(config: STDiTConfig) -> STDiT:
    """Build a model on the meta device, without changing torch's random state."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return STDiT(**asdict(config))
