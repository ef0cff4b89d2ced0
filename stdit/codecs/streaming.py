"""VAEs of diffusers that decode a video piece by piece, each with what their convolutions keep of those before.

So cuts in time change nothing. What of a VAE sees whole frames at the size of the latents is computed for these, and
only what follows is computed in tiles.

Letters: B batch, C channels of the latents, D of what is made of them, T frames; T' H' W' the same of the latents.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor


class Stream(NamedTuple):
    """How a class of VAE decodes piece by piece."""

    channels: Callable[[Any], int]
    """Of a VAE: D."""
    features: Callable[[Any, Tensor], Tensor]
    """Of a VAE and latents ``[B C T' H' W']``: ``[B D T' H' W']``, the part that sees whole frames."""
    decode: Callable[[Any, Iterable[Tensor]], Iterator[Tensor]]
    """Of a VAE and pieces of these that follow each other in time: their videos ``[B 3 T H W]``."""


@apply_forward_hook
def _wan_features(vae: Any, latents: Tensor) -> Tensor:
    """Compute the first convolution and the middle block, in which each latent attends to all of its frame."""
    x, kept = vae.decoder.conv_in(vae.post_quant_conv(latents)), _kept()
    frames = [vae.decoder.mid_block(frame, feat_cache=kept, feat_idx=[0]) for frame in x.split(1, dim=2)]
    return torch.cat(frames, dim=2)


@apply_forward_hook
def _wan_decode(vae: Any, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Do the rest as `AutoencoderKLWan._decode` and `WanDecoder3d.forward` do it."""
    decoder, size, kept, before = vae.decoder, vae.config.patch_size, _kept(), None
    for piece in pieces:
        frames = []
        for x in piece.split(1, dim=2):
            index = [0]
            for block in decoder.up_blocks:
                x = block(x, feat_cache=kept, feat_idx=index, first_chunk=before is None)
            x = decoder.nonlinearity(decoder.norm_out(x))
            frames.append(decoder.conv_out(x, before))
            before = (x if before is None else torch.cat([before, x], dim=2))[:, :, -2:]
        yield torch.cat(frames, dim=2) if size is None else unpatchify(torch.cat(frames, dim=2), size)


def _cogvideox_features(vae: Any, latents: Tensor) -> Tensor:
    return latents


@apply_forward_hook
def _cogvideox_decode(vae: Any, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Decode pairs of latent frames, the first three together, as `AutoencoderKLCogVideoX._decode` does."""
    kept = None
    for piece in pieces:
        frames, first = [], piece.shape[2] % 2
        for begin in range(0, max(piece.shape[2] - first, 1), 2):
            x = piece[:, :, begin + first * (begin > 0) : begin + first + 2]
            x = x if vae.post_quant_conv is None else vae.post_quant_conv(x)
            x, kept = vae.decoder(x, conv_cache=kept)
            frames.append(x)
        yield torch.cat(frames, dim=2)


def _kept() -> Any:
    """Return what Wan's convolutions keep, by their number; None at first."""
    return defaultdict(lambda: None)


STREAMING = {
    "AutoencoderKLWan": Stream(lambda vae: vae.decoder.conv_in.out_channels, _wan_features, _wan_decode),
    "AutoencoderKLCogVideoX": Stream(
        lambda vae: vae.config.latent_channels, _cogvideox_features, _cogvideox_decode
    ),
}
"""By name of the class in diffusers."""
