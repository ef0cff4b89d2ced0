"""Interface of all video codecs.

Letters: B batch, C latent channels, T frames, H height, W width in pixels; T' H' W' the same of the latents.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from sys import maxsize
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stdit.checkpoint_files import seal_folder
from stdit.codecs.config import CODECS, CodecConfig, Tile, check_tile
from stdit.codecs.loading import (
    check_options,
    explain_load_errors,
    fingerprint,
    local_weights,
    read_component,
    refuse_to_be_measured,
    write_component,
)
from stdit.codecs.memory import decoding_bytes
from stdit.codecs.placement import execution_device
from stdit.codecs.tiling import ALONE, WHOLE, Cuts, Part, Ranks, TilePlan, blend, cut, plan_tiles
from stdit.errors import UserError
from stdit.parallel.processes.memory import free_memory

logger = logging.getLogger(__name__)

CODEC_FILE = "codec.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
ENCODER_MODULES = ("encoder", "quant_conv")
"""Names, in all VAEs, of the modules that only encoding needs."""


class VideoCodec(ModelMixin):
    """Map videos [B 3 T H W] in [-1, 1] to latents [B C T' H' W'] and back. Frozen: it is never trained.

    A subclass sets ``name``, ``stride`` and ``channels``, and implements `_encode` and `_decode`, which get float32
    and sizes that the stride divides. Where the arguments of its `__init__` are not empty, it also overrides
    `from_config` and `saved_settings`. It is a diffusers `ModelMixin` so that diffusers pipelines save, load and
    offload it.
    """

    name: str
    """The value of ``codec.name`` that stands for it: see `stdit.codecs.register_codec`."""

    stride: tuple[int, int, int]
    """Frames, rows and columns of pixels per latent."""

    channels: int
    """Channels C of the latents."""

    causal_first_frame: bool = False
    """The first latent frame stands for one frame, each later one for `stride[0]`."""
    independent_frames: bool = False
    """Each latent frame decodes to the same pixels whatever the other latent frames are."""
    saved_with_runs: bool = False
    """Each run keeps its own copy: the weights are small, and nothing else is sure to keep them."""

    keeps_float32: bool = True
    """Its arithmetic is in fp32, also after `to` another precision."""

    size_multiple: int | None = None
    """Multiple, in pixels, to which named resolutions are rounded; None: what codec and patch divide."""

    latent_frame_group: int = 1
    """The number of latent frames (after the first, if causal) is a multiple of this."""

    use_slicing: bool = False
    """It encodes and decodes one video at a time: see `enable_slicing`."""

    tile: Tile | None = "auto"
    """Tiles in which it works: see `enable_tiling`; None: none."""
    tile_memory: int | None = None
    """Bytes that decoding may take; None: what is free when it begins."""

    latent_variance: Tensor | None
    """Variance [C] of the latents over the data, where it is known."""

    def __init__(self) -> None:
        super().__init__()
        # Tells the device of a codec without weights. On the CPU even if the codec is made on the meta device.
        self.register_buffer("placement", torch.empty(0, device="cpu"), persistent=False)
        self.register_buffer("latent_variance", None)
        self._released: list[str] = []
        self._decoding_bytes: dict[Any, int] = {}

    @property
    def device(self) -> torch.device:
        """Where it computes, also while its weights are offloaded."""
        return execution_device(self)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move, and change the precision, as `torch.nn.Module.to`; not the latter if it `keeps_float32`."""
        if self.keeps_float32:
            args = tuple(value for value in args if not isinstance(value, torch.dtype))
            kwargs.pop("dtype", None)
        return super().to(*args, **kwargs) if args or kwargs else self

    def component(self) -> ModelMixin:
        """Return what a pipeline has as its ``vae``: this, or the VAE that it wraps."""
        return self

    def enable_slicing(self) -> None:
        """Encode and decode the videos of a batch one after the other, which needs less memory."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode the videos of a batch at once, as at first."""
        self.use_slicing = False

    def enable_tiling(self, tile: Tile = 256, memory: int | None = None) -> None:
        """Decode in overlapping tiles that are blended, and encode rows and columns in such tiles.

        Args:
            tile: the setting ``codec.tile``: rows and columns, or frames, rows and columns of pixels. ``auto``: as at
                first, decode whole what fits in memory, and encode whole frames.
            memory: bytes that decoding may take; None: what is free when it begins.

        Raises:
            UserError: if the tile is too small.
        """
        check_tile(tile)
        self.tile, self.tile_memory = tile, memory

    def disable_tiling(self) -> None:
        """Encode and decode whole videos, whether they fit in memory or not."""
        self.tile = None

    @property
    def cuts(self) -> Cuts:
        """Where latents may be cut along time."""
        group, frames = self.latent_frame_group, self.stride[0]
        return Cuts(group, group * frames, int(self.causal_first_frame), self.independent_frames)

    def tile_plan(
        self,
        latent_shape: Sequence[int],
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 1,
        ranks: Ranks = ALONE,
        reserved: int = 0,
    ) -> TilePlan:
        """Return the tiles in which `decode` works; all ranks must ask.

        Args:
            latent_shape: T', H', W' of the latents.
            num_frames, height, width: of the video, as in `decode`.
            batch_size: videos that are decoded at once.
            ranks: those that decode together; they take the least memory that one of them has.
            reserved: bytes of the free memory that are for something else.

        Raises:
            UserError: if no tile fits in memory, or not the one that is asked for.
            ValueError: fewer frames or pixels than requested.
        """
        whole = self.pixel_shape(*latent_shape)
        wanted = (num_frames, height, width)
        size = [have if want is None else want for want, have in zip(wanted, whole, strict=True)]
        if any(want > have for want, have in zip(size, whole, strict=True)):
            raise ValueError(f"these latents decode to {whole} frames, rows and columns, fewer than {size}")
        memory = self.tile_memory
        if self.tile is None:  # whole, whatever there is
            memory = maxsize
        elif memory is None:
            memory = ranks.smallest(free_memory(self.device), self.device)
        return plan_tiles(self, latent_shape, size, self.tile, memory, batch_size, reserved)

    def decoding_bytes(self, latent_shape: tuple[int, int, int], batch_size: int = 1) -> int:
        """Return the peak bytes of decoding latents of T', H', W' whole: see `stdit.codecs.memory`.

        A codec whose `_decode` cannot run on tensors without values should override this: otherwise that counts as
        nothing, with a warning, so that videos are decoded whole.
        """
        key = (latent_shape, batch_size, self.dtype, self.device.type)
        if key not in self._decoding_bytes:
            try:
                self._decoding_bytes[key] = decoding_bytes(self, latent_shape, batch_size)
            except (RuntimeError, TypeError, NotImplementedError) as error:
                logger.warning(
                    "codec %s: the memory that it decodes with is not known, so that videos are decoded whole: it "
                    "cannot run on tensors without values, and has no decoding_bytes of its own (%s)",
                    *(self.name, str(error).partition("\n")[0]),
                )
                self._decoding_bytes[key] = 0
        return self._decoding_bytes[key]

    def feature_bytes(self, latent_shape: Sequence[int]) -> int:
        """Return the bytes of what `_features` makes of the latents of a video."""
        return 0

    def whole(self) -> "VideoCodec":
        """Return the whole codec, loaded again if its encoder was released."""
        return self._reloaded() if self._released else self

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (T', H', W') of the latents of a video of this many frames and pixels."""
        first = int(self.causal_first_frame)
        group = self.latent_frame_group
        groups = math.ceil((num_frames - first) / (self.stride[0] * group))
        return first + groups * group, math.ceil(height / self.stride[1]), math.ceil(width / self.stride[2])

    def pixel_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (T, H, W) to which latents of T', H', W' decode before padding is cut off."""
        first = int(self.causal_first_frame)
        return first + (num_frames - first) * self.stride[0], height * self.stride[1], width * self.stride[2]

    def latent_index(self, frame: int, num_frames: int | None = None) -> int:
        """Return the latent frame that holds a frame of a video of ``num_frames`` (None: of unlimited length)."""
        first = int(self.causal_first_frame)
        return frame if frame < first else first + (frame - first) // self.stride[0]

    def start_frame(self, index: int, num_frames: int | None = None) -> int:
        """Return the first frame that latent frame ``index`` holds."""
        first = int(self.causal_first_frame)
        return index if index < first else first + (index - first) * self.stride[0]

    def encoding_context(self, index: int, num_frames: int) -> tuple[int, int]:
        """Return how many latent frames, and frames, must be encoded before latent frame ``index`` to place it."""
        needed = int(self.causal_first_frame and index > 0)
        return needed, needed

    def pad_video(self, video: Tensor) -> Tensor:
        """Repeat the last frame, row and column of a video [B 3 T H W] up to a size that the stride divides."""
        size = video.shape[2:]
        whole = self.pixel_shape(*self.latent_shape(*size))
        frames, rows, columns = (target - have for target, have in zip(whole, size, strict=True))
        if not (frames or rows or columns):
            return video
        return F.pad(video, (0, columns, 0, rows, 0, frames), mode="replicate")

    def forward(self, compute: Callable[..., Tensor], *values: Any) -> Tensor:
        """Return ``compute(*values)``: what offloads weights and buffers only sees calls of ``forward``."""
        return compute(*values)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encode videos, deterministically, to normalised latents.

        Sizes that the stride does not divide are padded by repeating the last frame, row and column.

        Args:
            video: float [B 3 T H W] in [-1, 1], any T, H, W of at least 1; moved to the codec's device.

        Returns:
            float32 [B C T' H' W'], with T' H' W' as `latent_shape` says.

        Raises:
            ValueError: not of that shape, or integers.
        """
        if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
            raise ValueError(f"a video is a float tensor [B 3 T H W], not {video.dtype} {list(video.shape)}")
        if self.use_slicing and len(video) > 1:
            return torch.cat([self.encode(one) for one in video.split(1)])
        self._restore_encoder()
        video = self.pad_video(video.to(self.device, torch.float32))
        plan = self._encoding_plan(video)
        latents: Tensor = self(self._encode, video) if plan.whole else self._encode_tiles(video, plan)
        return latents.float().contiguous()

    def _encoding_plan(self, video: Tensor) -> TilePlan:
        """Return the tiles in which a padded video [B 3 T H W] is encoded: with all its frames.

        Latents must not depend on the memory of a machine: only tiles that are asked for are encoded.
        """
        size, side = video.shape[2:], self.tile if isinstance(self.tile, int) else WHOLE
        _, rows, columns = self.tile if isinstance(self.tile, tuple) else (WHOLE, side, side)
        return TilePlan.of(self, self.latent_shape(*size), size, (WHOLE, rows, columns))

    def _encode_tiles(self, video: Tensor, plan: TilePlan) -> Tensor:
        tiles = [tile for job in plan.jobs() for tile in job]

        def encode(job: int) -> Iterator[Tensor]:
            t, h, w = tiles[job]
            yield self(self._encode, cut(video, (t.pixels, h.pixels, w.pixels))).float()

        spans = [[part.latents for part in parts] for parts in plan.axes]
        covered = [[(t.latents, h.latents, w.latents)] for t, h, w in tiles]
        shape = self.latent_shape(*video.shape[2:])
        return blend(spans, covered, encode, video.new_zeros(len(video), self.channels, *shape))

    def encode_span(self, video: Tensor, start: int, num_frames: int) -> tuple[int, Tensor]:
        """Encode frames [B 3 T H W] of a longer video of ``num_frames``, beginning at its frame ``start``.

        Latent frames that are only partly covered are filled by repeating the first or last frame of ``video``.

        Returns:
            index of the first of these latent frames, and float32 [B C T' H' W'] as `encode` returns.
        """
        end = start + video.shape[2]
        first, last = (self.latent_index(frame, num_frames) for frame in (start, end - 1))
        context, context_frames = self.encoding_context(first, num_frames)
        before = context_frames + start - self.start_frame(first, num_frames)
        after = self.start_frame(last + 1, num_frames) - end
        filled = F.pad(video, (0, 0, 0, 0, before, after), mode="replicate")
        return first, self.encode(filled)[:, :, context : context + last + 1 - first]

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        plan: TilePlan | None = None,
        ranks: Ranks = ALONE,
    ) -> Tensor:
        """Decode latents, and cut the videos to `num_frames`, `height` and `width` pixels where these are given.

        Args:
            latents: float [B C T' H' W']; moved to the codec's device.
            plan: what `tile_plan` returned for them; None: ask it.
            ranks: those that share the tiles, if there are several: all of them must call this with the same latents,
                and all get the videos, equal bit for bit to those of one process.

        Returns:
            float32 [B 3 T H W], clamped to [-1, 1].

        Raises:
            ValueError: not of that shape, or fewer frames or pixels than requested.
            UserError: if there is not enough memory for a tile.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            shape = list(latents.shape)
            raise ValueError(f"latents of {self.name} are [B {self.channels} T H W], not {shape}")
        if self.use_slicing and len(latents) > 1:
            return torch.cat(
                [self.decode(one, num_frames, height, width, plan, ranks) for one in latents.split(1)]
            )
        if plan is None:
            plan = self.tile_plan(latents.shape[2:], num_frames, height, width, len(latents), ranks)
        latents, size = latents.to(self.device, torch.float32), plan.size
        if plan.whole:
            latents = latents[:, :, : plan.time[0].latents.stop]
            video = self(self._decode_frames, latents, size[0])
            return video[..., : size[1], : size[2]].float().clamp(-1, 1)
        return self._decode_tiles(latents, plan, ranks)

    def _decode_tiles(self, latents: Tensor, plan: TilePlan, ranks: Ranks) -> Tensor:
        """Decode latents [B C T' H' W'] in tiles, some of them on each rank -> float32 [B 3 T H W]."""
        features, jobs = self._features(latents), plan.jobs()

        def shown(tile: tuple[Part, Part, Part], end: int, video: Tensor) -> Tensor:
            time, rows, columns = tile
            return (
                video[:, :, time.context : end, : len(rows.pixels), : len(columns.pixels)]
                .float()
                .clamp(-1, 1)
            )

        def decode(job: int) -> Iterator[Tensor]:
            parts = (cut(features, (t.latents, h.latents, w.latents)) for t, h, w in jobs[job])
            ends = [t.context + len(t.pixels) for t, _, _ in jobs[job]]
            return map(shown, jobs[job], ends, self._decode_parts(parts, ends))

        pixels = [[part.pixels for part in parts] for parts in plan.axes]
        covered = [[(t.pixels, h.pixels, w.pixels) for t, h, w in job] for job in jobs]
        video = torch.zeros(len(latents), 3, *plan.size, device=latents.device)
        return blend(pixels, covered, decode, video, ranks).clamp_(-1, 1)  # sums of weights are rounded

    def _features(self, latents: Tensor) -> Tensor:
        """Return what tiles are cut from, of the size of the latents: these, or what a first part makes of them."""
        return latents

    def _decode_parts(self, parts: Iterable[Tensor], num_frames: Sequence[int]) -> Iterator[Tensor]:
        """Yield the videos of parts of the features; if the codec streams, these follow each other in time."""
        for part, frames in zip(parts, num_frames, strict=True):
            yield self(self._decode_frames, part, frames)

    def fingerprint(self) -> str:
        """Return a hash of name, settings and weights: without tiles, equal fingerprints give equal latents."""
        return self._hash(self.saved_settings())

    def encoding_fingerprint(self) -> str:
        """Return `fingerprint`, and the tiles if it encodes in some: equal ones give equal latents."""
        own = self.fingerprint()
        return own if self.tile in (None, "auto") else f"{own} {self.tile}"

    def release_encoder(self, reload: Callable[[], "VideoCodec"]) -> None:
        """Free the modules that only encoding needs; encoding and saving load them again.

        Args:
            reload: loads the whole codec.
        """
        names = [
            f"{path}.{part}" if path else part
            for path, module in self.named_modules()
            for part in ENCODER_MODULES
            if isinstance(getattr(module, part, None), nn.Module)
        ]
        self._reload, self._whole_fingerprint = reload, self.fingerprint()
        self._released = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
        for name in self._released:
            self.set_submodule(name, nn.Module())

    def _restore_encoder(self) -> None:
        if self._released:
            whole = self.whole()
            for name in self._released:
                self.set_submodule(name, whole.get_submodule(name).to(self.device))
            self._released = []

    def _reloaded(self) -> "VideoCodec":
        whole = self._reload()
        if whole.fingerprint() != self._whole_fingerprint:
            raise UserError(
                "codec.path holds other weights than when the run began: restore them, and run the same command again"
            )
        return whole

    @classmethod
    def from_config(cls, config: CodecConfig) -> Self:
        """Build the codec that a config describes."""
        return cls()

    def saved_settings(self) -> dict[str, Any]:
        """Return the arguments of `__init__`, as JSON has them; `codec.json` holds them beside the name."""
        return {}

    def save(self, directory: Path) -> None:
        """Write the weights, if there are any, as safetensors."""
        if state := self.state_dict():
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
            save_file(tensors, directory / WEIGHTS_FILE)

    @classmethod
    def load(cls, directory: Path, settings: dict[str, Any], dtype: torch.dtype | None) -> "VideoCodec":
        """Read what `save` wrote.

        Args:
            settings: what `codec.json` holds: ``name``, and what `saved_settings` returned.
            dtype: precision of a VAE's weights instead of the saved one. Here it is ignored: `_encode` gets float32.
        """
        with explain_load_errors(f"the codec {cls.name}", local_weights(directory)):
            codec = cls(**{key: value for key, value in settings.items() if key != "name"})
            if codec.state_dict():
                codec.load_state_dict(load_file(directory / WEIGHTS_FILE))
            return codec

    def _hash(self, settings: dict[str, Any]) -> str:
        if self._released:
            return self._whole_fingerprint
        return fingerprint({"name": self.name} | settings, self.state_dict())

    def _encode(self, video: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode_frames(self, latents: Tensor, num_frames: int) -> Tensor:
        """Decode latents of a video that had `num_frames`."""
        return self._decode(latents)[:, :, :num_frames]

    def save_pretrained(self, save_directory: str | PathLike[str]) -> None:  # type: ignore[override]
        """Write `codec.json`, weights (safetensors) and a manifest into a folder, made if it does not exist."""
        directory = Path(save_directory)
        if self._released:
            return self.whole().save_pretrained(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.save(directory)
        write_component(directory / CODEC_FILE, self.name, self.saved_settings(), CODECS)
        seal_folder(directory)

    load_config: Any = classmethod(refuse_to_be_measured)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **diffusers_options: Any,
    ) -> "VideoCodec":
        """Load the codec that `save_pretrained` wrote, of any registered class.

        Args:
            pretrained_model_name_or_path: local folder.
            torch_dtype, dtype: precision of a VAE, instead of the saved one; pixel, pca and tiny stay in fp32.
                The first is the name in older versions of diffusers.
            diffusers_options: what diffusers passes to every component; each is honoured or refused.

        Raises:
            UserError: not such a folder, damaged, or a codec of another class than `cls`.
        """
        device = check_options(diffusers_options)
        directory = Path(pretrained_model_name_or_path)
        found, settings = read_component(directory / CODEC_FILE, "codec", CODECS, cls)
        return found.load(directory, settings, dtype or torch_dtype).to(device)
