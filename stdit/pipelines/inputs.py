"""Inputs of a call of the pipeline: one value per prompt, noise, and conditioning frames as latents.

Letters: B prompts, C channels, T latent frames, H height, W width, L text tokens, E width of the text states.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stdit.diffusion.guidance import GUIDANCE_SCHEDULES
from stdit.errors import UserError
from stdit.pipelines.conditions import FrameCondition, find_unused_frames, warn_once

logger = logging.getLogger(__name__)


def for_each_prompt(value: Any, count: int, name: str) -> list[Any]:
    """Return a list of ``count`` values: ``value`` repeated, or ``value`` itself if it is a list of that length."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise UserError(f"{len(value)} values of {name} for {count} prompts: pass one, or one per prompt.")
    return list(value)


def check_embeds(named: Mapping[str, Any], prompts: int | None, width: int, longest: int) -> int:
    """Return B; raise UserError unless the text states of a call are ``[B L E]``, and their masks ``[B L]``.

    Args:
        named: by the names of the call's arguments; None: not given.
        prompts: B; None: that of prompt_embeds.
        width: E.
        longest: the largest L.
    """
    for kind in ("prompt", "negative_prompt"):
        embeds, mask = named[f"{kind}_embeds"], named[f"{kind}_attention_mask"]
        if embeds is None:
            if mask is not None:
                raise UserError(
                    f"{kind}_attention_mask without {kind}_embeds, whose mask it is: pass both, or a {kind}."
                )
            continue
        _check_tensor(f"{kind}_embeds", embeds, 3)
        prompts = prompts or max(1, len(embeds))
        if embeds.shape != (prompts, embeds.shape[1], width) or not 1 <= embeds.shape[1] <= longest:
            raise UserError(
                f"{kind}_embeds {list(embeds.shape)}: must be [{prompts}, L, {width}] (prompts, at most {longest} "
                "tokens, width of the text states)."
            )
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or mask.shape != embeds.shape[:2]:
            raise UserError(
                f"{kind}_attention_mask {_shape(mask)}: must be {list(embeds.shape[:2])}, as {kind}_embeds."
            )
    assert prompts is not None
    return prompts


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    """Raise UserError unless the noise of a call has the shape ``[B V, C, T, H, W]``, and is finite."""
    _check_tensor("latents", latents, len(shape))
    if latents.shape != shape:
        raise UserError(
            f"latents {list(latents.shape)}: must be {list(shape)} (videos, channels, latent frames, rows, columns)."
        )


def _check_tensor(name: str, value: Any, dimensions: int) -> None:
    if not isinstance(value, Tensor) or value.ndim != dimensions or not value.is_floating_point():
        raise UserError(
            f"{name} {_shape(value)}: must be a tensor of floating-point numbers with {dimensions} dimensions."
        )
    if not value.isfinite().all():
        raise UserError(f"{name} {_shape(value)}: has values that are NaN or infinite: pass finite numbers.")


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def changes_of_callback(
    returned: Any, given: Mapping[str, Tensor], names: Sequence[str], read_only: str
) -> dict[str, Tensor]:
    """Return the tensors that a callback has replaced; what it returns as it got it is no change.

    Args:
        returned: by the callback.
        given: the tensors that there are.
        names: those that a callback may name.
        read_only: one of them, which it may not replace.

    Raises:
        UserError: for another name or shape, a tensor that there is not, or one that is to be read only.
    """
    if returned is not None and not isinstance(returned, Mapping):
        raise UserError(
            f"callback_on_step_end returned a {type(returned).__name__}: must be a dictionary or None."
        )
    changed: dict[str, Tensor] = {}
    for name, value in (returned or {}).items():
        own = given.get(name)
        if name not in names:
            raise UserError(f"callback_on_step_end returned {name!r}: may only name {', '.join(names)}.")
        if value is own:
            continue
        if name == read_only:
            raise UserError(
                f"callback_on_step_end returned another {name}, which is to be read only: return what it got, or "
                "leave it out."
            )
        if own is None:
            raise UserError(
                f"callback_on_step_end returned {name}, which a call without guidance does not have: call with a "
                "guidance_scale other than 1, or leave it out."
            )
        if not isinstance(value, Tensor) or value.shape != own.shape:
            raise UserError(
                f"callback_on_step_end returned {name} {_shape(value)}: must be {list(own.shape)}, as what it got."
            )
        changed[name] = value.to(own)
    return changed


def conditions_of_prompts(image: Any, conditions: Any, count: int) -> list[list[FrameCondition]]:
    """Return the conditions of each of ``count`` prompts; an image is one on frame 0."""
    for_all = not conditions or isinstance(conditions[0], FrameCondition)
    images = for_each_prompt(image, count, "image")
    for one in images:
        if isinstance(one, Tensor) and one.ndim == 4:
            raise UserError(
                f"image is {tuple(one.shape)}: a video, but only the first frame is an image: use conditions = "
                "[FrameCondition(video)]."
            )
        if isinstance(one, str | Path):
            for warning in find_unused_frames(one):
                warn_once(warning)
    lists = for_each_prompt([list(conditions)] * count if for_all else conditions, count, "conditions")
    return [
        [*([] if one is None else [FrameCondition(one, 0, 1)]), *others]
        for one, others in zip(images, lists, strict=True)
    ]


def check_noise_levels(max_noise_level: Tensor, sigmas: Tensor, num_frames: int, patch_frames: int) -> Tensor:
    """Return the noise levels ``[B T]`` of conditioned latents, with 0 where the steps are too few to change them.

    Args:
        num_frames: frames of the video, for messages.
        patch_frames: latent frames in a patch of the model.

    Raises:
        UserError: if all are 0 in a video, or the model cannot be conditioned.
    """
    if (max_noise_level < 1).any() and patch_frames > 1:
        raise UserError(
            "this model joins frames in its patches, so it cannot be conditioned on single frames: leave the "
            "image and the conditions out."
        )
    unreached = (max_noise_level > 0) & (max_noise_level < sigmas[-2])
    if unreached.any():
        logger.warning(
            "conditioning frames with a strength above %.3g are kept as they are: %d steps are too few to change "
            "them",
            *(1 - sigmas[-2].item(), len(sigmas) - 1),
        )
        max_noise_level = max_noise_level.masked_fill(unreached, 0)
    if (max_noise_level == 0).all(1).any():
        latent_frames = max_noise_level.shape[1]
        raise UserError(
            f"num_frames = {num_frames} is {latent_frames} latent {'frame' if latent_frames == 1 else 'frames'}, "
            "and all are conditioning frames, which leaves nothing to generate: ask for more frames, or "
            "condition on fewer."
        )
    return max_noise_level


def guidance_scale_of_step(scale: float, sigma: float, step: int, settings: dict[str, Any]) -> float:
    """Return the guidance scale of a step at noise level ``sigma``, by the settings of a call."""
    low, high = settings["guidance_interval"]
    return GUIDANCE_SCHEDULES[settings["guidance_schedule"]](scale, sigma, step, (low, high))


def draw_noise(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Draw the noise of one sample on its generator's device, independent of the batch and the model's device."""
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.randn(shape, generator=generator, device=device).cpu()
