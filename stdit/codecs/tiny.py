"""Small convolutional autoencoder for small videos; its decoder takes noise off the latents.

Letters: B batch, C latent channels, T frames, H height, W width in pixels, T' latent frames, N groups of frames.
"""

from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (diffusers looks for it here)
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import silu

from stdit.checkpoint_files import verify
from stdit.codecs.base import VideoCodec
from stdit.codecs.config import CodecConfig, check_tiny_layers

PACKAGED = Path(__file__).parents[1] / "bundled" / "vae"
"""The trained codec that comes with stdit."""
_HOW_TO_GET = (
    "install stdit again (in a clone: git checkout stdit/bundled), or train one (python scripts/train_codec.py "
    "--config configs/codecs/tiny.yaml) and set codec.path = outputs/tiny"
)
"""What a user does who lacks it."""
FRAMES = 4
"""Of a group, which one latent frame stands for."""


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, added to their input (He et al. 2016, arXiv:1603.05027); at first it changes nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(channels // 16, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(silu(self.conv1(silu(self.norm(x)))))
        return out


class TinyCodec(VideoCodec):
    """Encode the first frame, and then groups of four frames, each by itself, with 2-D convolutions.

    Space is folded into channels, 4x4 and then 2x2 pixels (Shi et al. 2016, arXiv:1609.05158), and so are the frames
    of a group. The first frame is encoded like a group in which nothing moves. The decoder is trained on latents with
    noise, so that it also removes noise that a sampler left; LTX-Video's decoder does as well (HaCohen et al. 2024,
    arXiv:2501.00103). Each channel of the latents has mean 0 and variance 1 over the moving parts of clips, with
    which the codec is trained; over whole clips its variance is 0.4 to 1.
    """

    name = "tiny"
    stride = (FRAMES, 8, 8)
    causal_first_frame = True
    independent_frames = True
    saved_with_runs = True
    latent_mean: Tensor  # [C]
    latent_std: Tensor  # [C]

    def __init__(self, channels: int = 16, widths: tuple[int, int, int] = (48, 96, 160)) -> None:
        """Make a codec with random weights, frozen and in eval mode as all codecs are.

        Args:
            channels: of the latents.
            widths: channels of the layers at a quarter and an eighth of the size, and of those of a whole group;
                multiples of 16.

        Raises:
            UserError: for other widths, or no channels.
        """
        check_tiny_layers(channels, widths)
        super().__init__()
        self.channels, self.widths = channels, (widths[0], widths[1], widths[2])
        quarter, eighth, group = widths
        self.encoder = nn.ModuleDict(
            {
                "frames": nn.Sequential(
                    nn.PixelUnshuffle(4),
                    nn.Conv2d(3 * 4**2, quarter, 3, padding=1),
                    ResidualBlock(quarter),
                    nn.PixelUnshuffle(2),
                    nn.Conv2d(quarter * 2**2, eighth, 1),
                ),
                "group": nn.Sequential(
                    nn.Conv2d(FRAMES * eighth, group, 1),
                    ResidualBlock(group),
                    ResidualBlock(group),
                    nn.GroupNorm(group // 16, group),
                    nn.SiLU(),
                    nn.Conv2d(group, channels, 1),
                ),
            }
        )
        self.decoder = nn.ModuleDict(
            {
                "group": nn.Sequential(
                    nn.Conv2d(channels, group, 3, padding=1),
                    ResidualBlock(group),
                    ResidualBlock(group),
                    nn.Conv2d(group, FRAMES * eighth, 1),
                ),
                "frames": nn.Sequential(
                    ResidualBlock(eighth),
                    nn.Conv2d(eighth, quarter * 2**2, 1),
                    nn.PixelShuffle(2),
                    ResidualBlock(quarter),
                    ResidualBlock(quarter),
                    nn.Conv2d(quarter, 24 * 2**2, 1),
                    nn.PixelShuffle(2),
                    nn.SiLU(),
                    nn.Conv2d(24, 24, 3, padding=1),
                    nn.SiLU(),
                    nn.Conv2d(24, 3 * 2**2, 3, padding=1),
                    nn.PixelShuffle(2),
                ),
            }
        )
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))
        self.latent_variance = torch.ones(channels)
        self.eval().requires_grad_(False)

    @classmethod
    def from_config(cls, config: CodecConfig) -> Self:
        """Load the codec at ``config.path``, with its own channels; None: the one that comes with stdit.

        Raises UserError if there is none, or it is damaged.
        """
        if config.path is None:
            verify(PACKAGED, kind="the codec that comes with stdit,", way_out=_HOW_TO_GET)
            codec = cls.from_pretrained(PACKAGED)
        else:
            codec = cls.from_pretrained(Path(config.path).expanduser() / (config.subfolder or ""))
        assert isinstance(codec, cls)
        return codec

    def saved_settings(self) -> dict[str, Any]:
        return {"channels": self.channels, "widths": list(self.widths)}

    def encode_groups(self, groups: Tensor) -> Tensor:
        """Encode ``[N 3 4 H W]`` -> ``[N C H/8 W/8]``, not normalised."""
        frames = rearrange(groups, "N c t H W -> (N t) c H W").contiguous(memory_format=torch.channels_last)
        x = rearrange(self.encoder["frames"](frames), "(N t) c H W -> N (t c) H W", t=FRAMES)
        out: Tensor = self.encoder["group"](x)
        return out

    def decode_groups(self, latents: Tensor) -> Tensor:
        """Decode normalised latents ``[N C H/8 W/8]`` -> ``[N 3 4 H W]``."""
        latents = latents.contiguous(memory_format=torch.channels_last)
        x = rearrange(self.decoder["group"](latents), "N (t c) H W -> (N t) c H W", t=FRAMES)
        return rearrange(self.decoder["frames"](x), "(N t) c H W -> N c t H W", t=FRAMES)

    def normalise(self, latents: Tensor, rate: float | None = None) -> Tensor:
        """Bring each channel of ``[N C H W]`` to mean 0 and variance 1, by the statistics that are kept.

        Args:
            rate: in training: first move the kept statistics towards those of these latents by this share. Gradients
                are those of a normalisation by the latter, so that larger latents are no way out of the noise
                (batch renormalisation, Ioffe 2017, arXiv:1702.03275).
        """
        if rate is None:
            return (latents - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) + 1e-4
        self.latent_mean.lerp_(mean.detach(), rate)
        self.latent_std.lerp_(std.detach(), rate)
        scale = (std / self.latent_std).detach()
        shift = ((mean - self.latent_mean) / self.latent_std).detach()
        normal = (latents - mean[:, None, None]) / std[:, None, None]
        return normal * scale[:, None, None] + shift[:, None, None]

    def _encode(self, video: Tensor) -> Tensor:
        latents = self.normalise(self.encode_groups(split_groups(video)))
        return rearrange(latents, "(B T) C H W -> B C T H W", B=len(video))

    def _decode(self, latents: Tensor) -> Tensor:
        groups = self.decode_groups(rearrange(latents, "B C T H W -> (B T) C H W"))
        video = rearrange(groups, "(B T) c t H W -> B c (T t) H W", B=len(latents))
        return video[:, :, FRAMES - 1 :]  # of the first group, which stands for one frame, the last


def split_groups(video: Tensor) -> Tensor:
    """Split ``[B c T H W]``, T = 1 + 4 k, into groups ``[B*T' c 4 H W]``; the first group is frame 0, four times."""
    repeated = torch.cat([video[:, :, :1].expand(-1, -1, FRAMES - 1, -1, -1), video], dim=2)
    return rearrange(repeated, "B c (T t) H W -> (B T) c t H W", t=FRAMES)
