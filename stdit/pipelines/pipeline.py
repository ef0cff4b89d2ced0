"""STDiTPipeline: prompts and given frames in, video out.

Letters: B prompts, C channels, T latent frames, H height, W width, L text tokens, E width of the text states.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from stdit.codecs.base import VideoCodec
from stdit.codecs.loading import check_complete, explain_load_errors, local_weights, read_json
from stdit.codecs.text import TextEncoder
from stdit.diffusion.flow import RectifiedFlow, per_frame
from stdit.diffusion.guidance import GUIDANCE_SCHEDULES, moments, rescale, spread
from stdit.errors import UserError
from stdit.models.stdit import STDiT
from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.sequence.collectives import all_gather
from stdit.parallel.sequence.sharding import TokenSharding
from stdit.pipelines.conditions import FrameCondition, load_frames
from stdit.pipelines.config import VIDEO_SETTINGS, GuidanceSchedule, VideoSettings
from stdit.pipelines.images import Image

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class STDiTPipelineOutput(BaseOutput):
    """What a call returns."""

    frames: Any
    """By output_type: lists of PIL images a prompt; float array ``[B T H W 3]`` or tensor ``[B T 3 H W]`` in
    [0, 1]; or latents ``[B C T H W]``."""


class STDiTPipeline(DiffusionPipeline):
    """Text (and given frames) to video with an STDiT.

    The keyword settings of `__init__` are what a call uses unless told otherwise: the shape that the model
    was trained on, and sampling settings that suit it. ``step`` records the training step of the weights.
    """

    model_cpu_offload_seq = "text_encoder->transformer->codec"
    _callback_tensor_inputs = ["latents"]

    transformer: STDiT
    codec: VideoCodec
    text_encoder: TextEncoder
    scheduler: RectifiedFlow

    def __init__(
        self,
        transformer: STDiT,
        codec: VideoCodec,
        text_encoder: TextEncoder,
        scheduler: RectifiedFlow,
        num_frames: int = 16,
        height: int = 32,
        width: int = 32,
        fps: float = 8.0,
        num_inference_steps: int = 30,
        guidance_scale: float = 1.5,
        guidance_schedule: GuidanceSchedule = "constant",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        shift: float | None = None,
        step: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, codec=codec, text_encoder=text_encoder, scheduler=scheduler
        )
        self.register_to_config(
            num_frames=num_frames,
            height=height,
            width=width,
            fps=fps,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            shift=shift,
            step=step,
        )
        self.mesh = Mesh()

    def share(self, mesh: Mesh) -> None:
        """Share each video of a call, and the halves of its guidance, with the ranks that ``mesh`` names.

        These ranks must then make the same calls, and all get the whole result. Callbacks see a rank's frames.
        """
        self.mesh = mesh

    # ---- saving, loading, placing: the codec and the text encoder are not diffusers classes ----

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the components (safetensors and JSON only) and ``model_index.json``, which comes last."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, component in self.components.items():
            component.save_pretrained(folder / name)
        self.save_config(folder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load what `save_pretrained` wrote. Keywords replace a component or a setting; ``torch_dtype`` (or
        ``dtype``) is the transformer's.

        Raises:
            UserError: if the folder holds no pipeline, or a damaged one.
        """
        folder = Path(pretrained_model_name_or_path)
        recorded = read_json(folder / cls.config_name, "a pipeline")
        dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
        loaders: dict[str, Callable[[Path], Any]] = {
            "transformer": partial(read_transformer, dtype=dtype),
            "codec": VideoCodec.from_pretrained,
            "text_encoder": TextEncoder.from_pretrained,
            "scheduler": RectifiedFlow.from_pretrained,
        }
        for name, load in loaders.items():
            if name not in kwargs:
                with explain_load_errors(f"the pipeline's {name}", local_weights(folder / name)):
                    kwargs[name] = load(folder / name)
        settings = {name: recorded[name] for name in (*VIDEO_SETTINGS, "step") if name in recorded}
        return cls(**{**settings, **kwargs})

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move everything to a device; a dtype is the transformer's alone (the codec has its own)."""
        for value in (*args, kwargs.get("device"), kwargs.get("dtype")):
            if isinstance(value, torch.dtype):
                torch.nn.Module.to(self.transformer, value)  # diffusers' own would warn about nothing
            elif value is not None:
                for component in (self.transformer, self.codec, self.text_encoder):
                    component.to(value)
        return self

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    # ---- the call ----

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str | None] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: GuidanceSchedule | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | None = None,
        shift: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        image: Image | Sequence[Image | None] | None = None,
        conditions: Sequence[FrameCondition] | Sequence[Sequence[FrameCondition]] = (),
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Generate one video a prompt. A setting left at None takes the pipeline's own (``pipe.config``).

        Args:
            prompt: one caption, or B of them.
            negative_prompt: what guidance leads away from; None: the learned null caption.
            num_frames: length of the videos in frames.
            height: height in pixels.
            width: width in pixels.
            fps: frames per second.
            num_inference_steps: Euler steps.
            guidance_scale: 1 follows the caption as trained; more follows it harder (Ho & Salimans 2022,
                arXiv:2207.12598).
            guidance_schedule: how the scale changes from step to step: see `stdit.diffusion.guidance`.
            guidance_interval: the noise levels between which the schedule "interval" guides.
            guidance_rescale: 0 to 1, how far the guided velocity is brought back to the spread of the unguided.
            shift: moves the steps towards noise; None: as the scheduler finds for the size.
            generator: one for all prompts (drawn from in turn), or one a prompt, so that a video does not
                depend on what else is in the batch.
            image: the first frame, for all prompts or one a prompt: a PIL image; an array ``[H W 3]``, uint8
                or in [0, 1]; or a tensor ``[3 H W]`` in [-1, 1]. Resized and cropped to the video's size.
            conditions: frames given anywhere in the video, for all prompts or a list for each; later ones win.
            output_type: pil, np, pt or latent: see `STDiTPipelineOutput`.
            return_dict: if False, return ``(frames,)``.
            callback_on_step_end: called as ``callback(pipe, step, timestep, {"latents": ...})`` after each
                step; latents in the dictionary that it returns replace those of the pipeline.
            callback_on_step_end_tensor_inputs: names of the tensors given to the callback.

        Returns:
            an `STDiTPipelineOutput`.

        Raises:
            UserError: if an argument breaks its rule.
        """
        given_by_caller: dict[str, Any] = dict(
            num_frames=num_frames,
            height=height,
            width=width,
            fps=fps,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            shift=shift,
        )
        settings = {name: self.config[name] if v is None else v for name, v in given_by_caller.items()}
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = _for_each(negative_prompt, len(prompts), "negative_prompt")
        images = _for_each(image, len(prompts), "image")
        shared = not conditions or isinstance(conditions[0], FrameCondition)
        given = _for_each(
            [list(conditions)] * len(prompts) if shared else conditions, len(prompts), "conditions"
        )
        given = [
            [*([] if one is None else [FrameCondition(one, 0, 1)]), *others]
            for one, others in zip(images, given, strict=True)
        ]
        generators = _for_each(generator, len(prompts), "generator")
        VideoSettings(**settings).check()
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise UserError(f"prompt = {prompt!r}: must be a caption or a list of at least one.")
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type = {output_type!r}: must be one of {', '.join(OUTPUT_TYPES)}.")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise UserError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}: may only name "
                f"{self._callback_tensor_inputs}."
            )
        num_frames, height, width = (int(settings[name]) for name in ("num_frames", "height", "width"))

        device = self._execution_device
        shape = (self.codec.channels, *self.codec.latent_shape(num_frames, height, width))
        sigmas = self.scheduler.sigmas(
            int(settings["num_inference_steps"]), shape[1], height, width, shift=settings["shift"]
        ).to(device)
        scales = _guidance_scales(sigmas, settings)
        guided = any(scale != 1 for scale in scales)
        condition = self._encode_prompts(prompts, negatives if guided else None, device)
        if guided:
            drop = [False] * len(prompts) + [negative is None for negative in negatives]
            condition["drop_caption"] = torch.tensor(drop, device=device)
        rows = len(condition["encoder_hidden_states"])
        for name, value in (("fps", settings["fps"]), ("height", height), ("width", width)):
            condition[name] = torch.full((rows,), float(value), device=device)

        noise = torch.stack([_noise(shape, one) for one in generators]).to(device)  # [B C T H W]
        latents, max_noise_level = (
            torch.zeros_like(noise),
            torch.ones(len(prompts), shape[1], device=device),
        )  # [B T]
        for index, some in enumerate(given):
            for one in some:
                self._lay_in(one, latents[index], max_noise_level[index], num_frames, settings)
        if (max_noise_level < 1).any() and self.transformer.config.patch_size[0] > 1:
            raise UserError(
                "this model joins frames in its patches, so no single one can be given: leave the image and the "
                "conditions out."
            )
        idle = (max_noise_level > 0) & (max_noise_level < sigmas[-2])
        if idle.any():
            logger.warning(
                "given frames with a strength above %.3g are kept as they are: %d steps are too few to change them",
                *(1 - sigmas[-2].item(), len(sigmas) - 1),
            )
            max_noise_level = max_noise_level.masked_fill(idle, 0)
        if (max_noise_level == 0).all(1).any():
            raise UserError(
                f"num_frames = {num_frames} is {shape[1]} latent {'frame' if shape[1] == 1 else 'frames'}, and all "
                "are given, which leaves nothing to make: ask for more frames, or give fewer."
            )

        sharding = self.transformer.token_sharding(self.mesh.sp, *shape[1:])
        latents = self._denoise(
            sharding.split(latents, dim=2),
            sharding.split(noise, dim=2),
            max_noise_level,
            sharding,
            sigmas,
            condition,
            scales,
            float(settings["guidance_rescale"]),
            callback_on_step_end,
            list(callback_on_step_end_tensor_inputs),
        )
        if output_type == "latent":
            frames = sharding.gather(latents, 2, shape[1])
        else:
            frames = self._decode(latents, sharding, shape[1], settings, output_type)
        self.maybe_free_model_hooks()
        return STDiTPipelineOutput(frames=frames) if return_dict else (frames,)

    def _denoise(
        self,
        latents: Tensor,
        noise: Tensor,
        max_noise_level: Tensor,
        sharding: TokenSharding,
        sigmas: Tensor,
        condition: dict[str, Tensor],
        scales: list[float],
        rescaled: float,
        callback: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None] | None,
        callback_inputs: list[str],
    ) -> Tensor:
        """Euler's method from noise (sigma 1) to data (sigma 0): Liu et al. 2022 (arXiv:2209.03003).

        A frame is given, without noise, until sigma has come down to its ``max_noise_level [B T]``; from there on it
        is made as the others are. So 1 is a free frame, which begins as noise, and 0 one that stays as it is.
        ``latents`` and ``noise`` are this rank's frames.
        """
        if (max_noise_level == 1).all():
            max_noise_level = max_noise_level[:, :1]  # one level a sample is cheaper for the model
        free = torch.zeros_like(max_noise_level, dtype=torch.bool)
        for index, (sigma, sigma_next) in enumerate(
            self.progress_bar(list(zip(sigmas[:-1], sigmas[1:], strict=True)))
        ):
            new, free = (sigma <= max_noise_level) & ~free, sigma <= max_noise_level  # [B F]
            joins = per_frame(sharding.split(new, dim=1))
            latents = torch.where(joins, torch.lerp(latents, noise, sigma), latents)
            velocity = self._guided_velocity(
                latents, sigma * free, sharding, condition, scales[index], rescaled
            )
            step = sharding.split((sigma - sigma_next) * free, dim=1)
            latents = latents + per_frame(step) * velocity
            if callback is not None:
                tensors = {name: {"latents": latents}[name] for name in callback_inputs}
                latents = (callback(self, index, 1000 * sigma, tensors) or {}).get("latents", latents)
        return latents

    def _guided_velocity(
        self,
        x_t: Tensor,
        t: Tensor,
        sharding: TokenSharding,
        condition: dict[str, Tensor],
        scale: float,
        rescaled: float,
    ) -> Tensor:
        """``v_uncond + g (v_cond - v_uncond)`` (Ho & Salimans 2022, equation 6); both in one batch, or on two ranks.

        At g = 1 the second half would cancel out, and is left out. ``t [B F]`` is of all frames.
        """
        if scale == 1:
            own = {name: value[: len(x_t)] for name, value in condition.items()}
            return self._velocity(x_t, t, sharding, own)
        group = self.mesh.cfg
        if group.size == 1:
            both = self._velocity(x_t.repeat(2, 1, 1, 1, 1), t.repeat(2, 1), sharding, condition)
        else:
            own = {name: value.chunk(2)[group.rank] for name, value in condition.items()}
            both = all_gather(self._velocity(x_t, t, sharding, own), group, 0, [len(x_t)] * 2)
        conditional, unconditional = both.chunk(2)
        velocity = unconditional + scale * (conditional - unconditional)
        if not rescaled:
            return velocity
        parts = torch.stack([moments(conditional), moments(velocity)])[None]
        sums = all_gather(parts, sharding.group, 0, [1] * sharding.group.size).sum(
            0
        )  # over the ranks' frames
        return rescale(velocity, spread(sums[0]), spread(sums[1]), rescaled)

    def _velocity(
        self, x_t: Tensor, t: Tensor, sharding: TokenSharding, condition: dict[str, Tensor]
    ) -> Tensor:
        level = sharding.split(t, dim=1)
        model_input = self.scheduler.scale_model_input(x_t, level).to(self.transformer.dtype)
        output = self.transformer(
            hidden_states=model_input, timestep=1000 * t, **condition, sharding=sharding
        )
        return self.scheduler.velocity(output.float(), x_t, level)

    def _encode_prompts(
        self, prompts: list[str], negatives: list[str | None] | None, device: torch.device
    ) -> dict[str, Tensor]:
        """Text states ``[B L E]`` and mask ``[B L]`` of the prompts, then of what guidance leads away from.

        Where a negative is None, its prompt's states stand in, for the model to replace by the null caption.
        """
        texts = list(prompts)
        if negatives is not None:
            texts += [p if n is None else n for p, n in zip(prompts, negatives, strict=True)]
        distinct = list(dict.fromkeys(texts))
        _onload(self.text_encoder)
        states, mask = self.text_encoder.encode(distinct)
        row = [distinct.index(text) for text in texts]
        return {
            "encoder_hidden_states": states[row].to(device, self.transformer.dtype),
            "encoder_attention_mask": mask[row].to(device),
        }

    def _lay_in(
        self,
        condition: FrameCondition,
        latents: Tensor,
        max_noise_level: Tensor,
        num_frames: int,
        settings: dict[str, Any],
    ) -> None:
        """Put given frames into ``latents [C T H W]``, and their level into ``max_noise_level [T]``."""
        fps, height, width = float(settings["fps"]), int(settings["height"]), int(settings["width"])
        condition = condition.resolved(num_frames, fps)
        video = load_frames(condition, fps, height, width)[None]  # [1 3 T H W]
        _onload(self.codec)
        start, _ = condition.span(num_frames)
        first, given = self.codec.encode_span(video.to(latents.device), start, num_frames)
        place = slice(first, first + given.shape[2])
        latents[:, place], max_noise_level[place] = given[0], 1 - condition.strength

    def _decode(
        self,
        latents: Tensor,
        sharding: TokenSharding,
        latent_frames: int,
        settings: dict[str, Any],
        output_type: str,
    ) -> Any:
        """Pixels of each video by itself: less memory, and no dependence on the batch.

        ``latents`` are this rank's frames; each rank decodes its own where the codec lets frames stand alone.
        """
        size = [int(settings[name]) for name in ("num_frames", "height", "width")]
        _onload(self.codec)
        alone = self.codec.independent_frames
        if not alone:
            latents = sharding.gather(latents, 2, latent_frames)
        frames = None if alone else size[0]
        video = [self.codec.decode(one[None], frames, size[1], size[2]) for one in latents]
        pixels = torch.cat(video)  # [B 3 T H W]
        if alone:
            each = [
                frames * self.codec.stride[0] for frames in sharding.latent_frames_per_rank(latent_frames)
            ]
            pixels = all_gather(pixels, sharding.group, 2, each)
        return VideoProcessor().postprocess_video(pixels[:, :, : size[0]].float(), output_type=output_type)


def read_transformer(folder: Path, dtype: torch.dtype | None = None) -> STDiT:
    """The STDiT that a folder holds. Raises UserError if it is damaged, or its weights are not its config's."""
    source = local_weights(folder)
    with explain_load_errors("the transformer", source):
        model, info = STDiT.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    check_complete("the transformer", source, [*info["missing_keys"], *info["unexpected_keys"]])
    return model


def _for_each(value: Any, count: int, name: str) -> list[Any]:
    """``value`` as a list of ``count``: itself repeated, or the list that it is, of that length."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise UserError(f"{len(value)} values of {name} for {count} prompts: give one, or one a prompt.")
    return list(value)


def _guidance_scales(sigmas: Tensor, settings: dict[str, Any]) -> list[float]:
    """The guidance scale of each step."""
    scale, (low, high) = float(settings["guidance_scale"]), settings["guidance_interval"]
    schedule = GUIDANCE_SCHEDULES[settings["guidance_schedule"]]
    return [schedule(scale, sigma, step, (low, high)) for step, sigma in enumerate(sigmas[:-1].tolist())]


def _noise(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Noise of one sample, drawn where its generator lives: batch and model's device do not change it."""
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.randn(shape, generator=generator, device=device).cpu()


def _onload(module: Any) -> None:
    """Fetch a component that `enable_model_cpu_offload` put away: its hook only sees calls of `forward`."""
    if hasattr(module, "_hf_hook"):
        module._hf_hook.pre_forward(module)
