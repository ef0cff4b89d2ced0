"""What every video codec offers.

Letters: B batch, C latent channels, T frames, H height, W width in pixels; T' H' W' the same of the latents.
"""

import math
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from stdit.codecs.config import CodecConfig
from stdit.codecs.loading import check_options, fingerprint, read_json, write_json
from stdit.errors import UserError

CODEC_FILE = "codec.json"
ENCODER_PARTS = ("encoder", "quant_conv")
"""What the VAEs call the modules that only encoding needs."""


class VideoCodec(ModelMixin):
    """Maps videos [B 3 T H W] in [-1, 1] to latents [B C T' H' W'] and back. Frozen: it is never trained.

    A subclass sets the attributes below and gives `_encode` and `_decode`, which see only float32 and sizes
    that fit, and `facts`, `save` and `load`, which say what a saved folder holds and how to read it. It is a
    diffusers `ModelMixin` only so that a diffusers pipeline saves and loads it as a component.
    """

    name: str
    """Key of the codec in `stdit.codecs.CODECS`."""

    stride: tuple[int, int, int]
    """Frames, rows and columns of pixels that one latent stands for."""

    channels: int
    """Channels C of the latents."""

    causal_first_frame: bool = False
    """The first latent frame stands for one frame, each later one for `stride[0]`."""
    frames_alone: bool = False
    """Each latent frame decodes by itself, whatever is beside it."""

    size_multiple: int | None = None
    """What height and width by name are rounded to, in pixels; None: what codec and patch divide."""

    latent_frame_group: int = 1
    """Latent frames (after the first, if causal) come in groups of so many."""

    latent_variance: Tensor | None
    """Variance [C] of the latents over the data, where it is known."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("latent_variance", None)
        self._released: list[str] = []

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T', H', W') of the latents of a video of this size in frames and pixels."""
        first = int(self.causal_first_frame)
        group = self.latent_frame_group
        groups = math.ceil((num_frames - first) / (self.stride[0] * group))
        return first + groups * group, math.ceil(height / self.stride[1]), math.ceil(width / self.stride[2])

    def pixel_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T, H, W) that latents of T', H', W' decode to before anything is cut off."""
        first = int(self.causal_first_frame)
        return first + (num_frames - first) * self.stride[0], height * self.stride[1], width * self.stride[2]

    def latent_index(self, frame: int, num_frames: int | None = None) -> int:
        """The latent frame that holds a frame of a video of so many frames (None: of more than enough)."""
        first = int(self.causal_first_frame)
        return frame if frame < first else first + (frame - first) // self.stride[0]

    def first_frame(self, index: int, num_frames: int | None = None) -> int:
        """The first frame that a latent frame holds: the number of frames in all before it."""
        first = int(self.causal_first_frame)
        return index if index < first else first + (index - first) * self.stride[0]

    def lead(self, index: int, num_frames: int) -> tuple[int, int]:
        """What must be encoded before a latent frame for it to hold its frames: latent frames, and frames in them."""
        needed = int(self.causal_first_frame and index > 0)
        return needed, needed

    def padded(self, video: Tensor) -> Tensor:
        """A video [B 3 T H W] with its last frame, row and column repeated up to a size that fits."""
        size = video.shape[2:]
        whole = self.pixel_shape(*self.latent_shape(*size))
        frames, rows, columns = (target - have for target, have in zip(whole, size, strict=True))
        if not (frames or rows or columns):
            return video
        return F.pad(video, (0, columns, 0, rows, 0, frames), mode="replicate")

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Latents of videos, the same every time; scaled and shifted as the codec wants it.

        What the codec cannot divide is filled up by repeating the last frame, row and column.

        Args:
            video: float [B 3 T H W] in [-1, 1], any T, H, W of at least 1; moved to the codec's device.

        Returns:
            float32 [B C T' H' W'], with T' H' W' as `latent_shape` says.

        Raises:
            ValueError: not of that shape, or integers.
        """
        if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
            raise ValueError(f"a video is a float tensor [B 3 T H W], not {video.dtype} {list(video.shape)}")
        self._restore_encoder()
        return self._encode(self.padded(video.to(self.device, torch.float32))).float().contiguous()

    def encode_inside(self, video: Tensor, start: int, num_frames: int) -> tuple[int, Tensor]:
        """Latents of frames [B 3 T H W] that lie inside a longer video, from its frame ``start`` on.

        They fill whole latent frames: before its first frame and after its last one, ``video`` stands still.

        Returns:
            the first of these latent frames, and float32 [B C T' H' W'] as of `encode`.
        """
        end = start + video.shape[2]
        first, last = (self.latent_index(frame, num_frames) for frame in (start, end - 1))
        lead, lead_frames = self.lead(first, num_frames)
        before = lead_frames + start - self.first_frame(first, num_frames)
        after = self.first_frame(last + 1, num_frames) - end
        filled = F.pad(video, (0, 0, 0, 0, before, after), mode="replicate")
        return first, self.encode(filled)[:, :, lead : lead + last + 1 - first]

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Videos of latents, cut to `num_frames`, `height` and `width` pixels where these are given.

        Args:
            latents: float [B C T' H' W']; moved to the codec's device.

        Returns:
            float32 [B 3 T H W], clamped to [-1, 1].

        Raises:
            ValueError: not of that shape, or fewer frames or pixels than are asked for.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            shape = list(latents.shape)
            raise ValueError(f"latents of {self.name} are [B {self.channels} T H W], not {shape}")
        whole = self.pixel_shape(*latents.shape[2:])
        wanted = (num_frames, height, width)
        size = [have if want is None else want for want, have in zip(wanted, whole, strict=True)]
        if any(want > have for want, have in zip(size, whole, strict=True)):
            raise ValueError(f"these latents decode to {whole} frames, rows and columns, fewer than {size}")
        video = self._decode_frames(latents.to(self.device, torch.float32), size[0])
        return video[..., : size[1], : size[2]].float().clamp(-1, 1)

    def fingerprint(self) -> str:
        """Hash of class, settings and weights: equal fingerprints give equal latents."""
        return self._hash(self.facts())

    def release_encoder(self, reload: Callable[[], "VideoCodec"]) -> None:
        """Let go of the modules that only encoding needs; when it, or saving, needs them, they are read again.

        Args:
            reload: reads the codec again.
        """
        names = [
            f"{path}.{part}" if path else part
            for path, module in self.named_modules()
            for part in ENCODER_PARTS
            if isinstance(getattr(module, part, None), nn.Module)
        ]
        self._reload, self._whole_fingerprint = reload, self.fingerprint()
        self._released = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
        for name in self._released:
            self.set_submodule(name, nn.Module())

    def _restore_encoder(self) -> None:
        if self._released:
            whole = self._reloaded()
            for name in self._released:
                self.set_submodule(name, whole.get_submodule(name).to(self.device))
            self._released = []

    def _reloaded(self) -> "VideoCodec":
        whole = self._reload()
        if whole.fingerprint() != self._whole_fingerprint:
            raise UserError(
                "codec.path holds other weights than when the run began: put the first ones back, and run the same "
                "command again"
            )
        return whole

    @classmethod
    def from_config(cls, config: CodecConfig) -> Self:
        """The codec that a config describes."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What `codec.json` holds beside the name."""
        return {}

    @classmethod
    def load(cls, directory: Path, facts: dict[str, Any], dtype: torch.dtype | None) -> "VideoCodec":
        """Read what `save` and `facts` wrote."""
        raise NotImplementedError

    def save(self, directory: Path) -> None:
        """Write the weights, as safetensors."""

    def _hash(self, settings: dict[str, Any]) -> str:
        if self._released:
            return self._whole_fingerprint
        return fingerprint({"name": self.name} | settings, self.state_dict())

    def _encode(self, video: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode_frames(self, latents: Tensor, num_frames: int) -> Tensor:
        """The video of latents, which was `num_frames` long."""
        return self._decode(latents)[:, :, :num_frames]

    def save_pretrained(self, save_directory: str | PathLike[str]) -> None:  # type: ignore[override]
        """Write `codec.json` and the weights (safetensors) into a folder, made if need be."""
        directory = Path(save_directory)
        if self._released:
            return self._reloaded().save_pretrained(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.save(directory)
        write_json(directory / CODEC_FILE, {"name": self.name} | self.facts())

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **diffusers_options: Any,
    ) -> "VideoCodec":
        """The codec that `save_pretrained` wrote, of whatever class it is.

        Args:
            pretrained_model_name_or_path: local folder.
            torch_dtype, dtype: precision of a VAE, instead of the saved one; pixel and pca stay in fp32.
                The first is the name in older versions of diffusers.
            diffusers_options: what diffusers passes to any component; each is honoured or refused.

        Raises:
            UserError: not such a folder, damaged, or a codec of another class than `cls`.
        """
        check_options(diffusers_options)
        directory = Path(pretrained_model_name_or_path)
        facts = read_json(directory / CODEC_FILE, "the folder of a saved codec")
        name = facts.get("name")
        found = codec_class(name)
        if found is None:
            raise UserError(f"{str(directory)!r} holds the codec {name!r}, which this version does not know")
        if not issubclass(found, cls):
            raise UserError(f"{str(directory)!r} holds the codec {name!r}, which is no {cls.__name__}")
        return found.load(directory, facts, dtype or torch_dtype)


def codec_class(name: str | None) -> type[VideoCodec] | None:
    """The class behind a codec's name; None if there is none."""
    from stdit.codecs.diffusers_vae import VAES, DiffusersCodec
    from stdit.codecs.opensora_vae import OpenSoraCodec
    from stdit.codecs.pca import PCACodec
    from stdit.codecs.pixel import PixelCodec

    classes: dict[str, type[VideoCodec]] = {c.name: c for c in (PixelCodec, PCACodec, OpenSoraCodec)}
    return (classes | dict.fromkeys(VAES, DiffusersCodec)).get(name or "")
