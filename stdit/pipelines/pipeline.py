"""STDiTPipeline: from prompts and conditioning frames to videos.

Letters: B prompts, C channels, T latent frames, H height, W width, L text tokens, E width of the text states.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from stdit.checkpoint_files import META, read_json, seal_folder, verify_if_sealed
from stdit.codecs.base import VideoCodec
from stdit.codecs.text import TextEncoder
from stdit.diffusion.config import FlowConfig
from stdit.diffusion.flow import FlowObjective, per_frame
from stdit.diffusion.guidance import rescale_guidance, sample_moments, standard_deviation
from stdit.diffusion.scheduler import set_flow_timesteps
from stdit.errors import UserError
from stdit.models.stdit import STDiT
from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.sequence.collectives import all_gather
from stdit.parallel.sequence.sharding import TokenSharding
from stdit.pipelines.bundled import bundled_folder
from stdit.pipelines.components import pop_dtype, read_components, read_flow
from stdit.pipelines.conditions import FrameCondition, load_frames
from stdit.pipelines.config import (
    PIPELINE_DEFAULTS,
    VIDEO_SETTINGS,
    VideoSettings,
    check_recorded,
    guides_refinement,
    list_settings,
    video_settings,
)
from stdit.pipelines.images import Image
from stdit.pipelines.inputs import (
    check_noise_levels,
    conditions_of_prompts,
    draw_noise,
    for_each_prompt,
    guidance_scales,
    onload,
)

logger = logging.getLogger(__name__)

_RECORDED = ("flow", "step", "trained_sizes", "lineage", "vocabulary")
"""What a pipeline records beside its settings."""
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
StepCallback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass
class STDiTPipelineOutput(BaseOutput):
    """Result of a call."""

    frames: Any
    """By output_type: a list of PIL images per prompt; float array ``[B T H W 3]`` or tensor ``[B T 3 H W]`` in
    [0, 1]; or latents ``[B C T H W]``."""


@dataclass(frozen=True)
class _ModelInputs:
    """Inputs of the model and of guidance that are the same in all steps."""

    arguments: dict[str, Tensor]
    """Text states, mask, fps, height, width: rows of prompts; with guidance, rows of negative prompts follow."""
    sharding: TokenSharding
    guidance_scales: list[float]
    """Per step."""
    guidance_rescale: float


class STDiTPipeline(DiffusionPipeline):
    """Generate videos from prompts, and from conditioning frames, with an STDiT."""

    model_cpu_offload_seq = "text_encoder->transformer->codec"
    _callback_tensor_inputs = ["latents"]

    transformer: STDiT
    codec: VideoCodec
    text_encoder: TextEncoder
    scheduler: SchedulerMixin

    @list_settings(PIPELINE_DEFAULTS)
    def __init__(
        self,
        transformer: STDiT,
        codec: VideoCodec,
        text_encoder: TextEncoder,
        scheduler: SchedulerMixin,
        *,
        flow: FlowConfig | Mapping[str, Any] | None = None,
        step: int | None = None,
        trained_sizes: Sequence[dict[str, Any]] | None = None,
        lineage: Sequence[dict[str, Any]] = (),
        vocabulary: Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        """Assemble a pipeline.

        Args:
            scheduler: `stdit.RectifiedFlow`, or another scheduler of diffusers that can do flow matching.
            flow: the objective of the training, which says what the model's output means; a mapping has the fields of
                `FlowConfig`. None: the velocity.
            step: training step of the weights.
            trained_sizes: the sizes that the model was trained on, each with num_frames, height, width, fps and the
                number of clips.
            lineage: changes of data and settings in their training, each with step, changes, and hashes of the
                experiment before and after.
            vocabulary: the words, in lower case, of the captions that the model was trained on.
            settings: the fields of `VideoSettings`: defaults of a call, such as the size that the model was trained
                on, and sampling settings that suit it.

        Raises:
            TypeError: for a setting that does not exist.
        """
        super().__init__()
        self.register_modules(
            transformer=transformer, codec=codec, text_encoder=text_encoder, scheduler=scheduler
        )
        if not isinstance(flow, FlowConfig):
            self.flow = FlowObjective.from_settings(flow or {}, codec.latent_variance)
        else:
            self.flow = FlowObjective(flow, codec.latent_variance)
        own = video_settings(STDiTPipeline.__init__, settings)
        sizes = None if trained_sizes is None else [dict(size) for size in trained_sizes]
        recorded = {
            "flow": self.flow.settings(),
            "step": step,
            "trained_sizes": sizes,
            "lineage": [dict(change) for change in lineage],
            "vocabulary": None if vocabulary is None else list(vocabulary),
        }
        self.register_to_config(**own.resolved(PIPELINE_DEFAULTS), **recorded)
        self.mesh = Mesh()

    def share(self, mesh: Mesh) -> None:
        """Divide each call among the ranks of a mesh: frames among ``sp``, the two halves of guidance among ``cfg``.

        All these ranks must then make the same calls, and all get the whole result. A callback gets the latents of
        its rank.
        """
        self.mesh = mesh

    # ---- saving, loading, placing: the codec and the text encoder are not diffusers classes ----

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """Write the components (safetensors and JSON only), ``model_index.json`` and, last, a manifest of all.

        Raises:
            UserError: for other arguments of diffusers (variant, max_shard_size, push_to_hub), which have no effect.
        """
        others = {name: value for name, value in kwargs.items() if value not in (None, False)}
        others |= {} if safe_serialization else {"safe_serialization": False}
        if others:
            raise UserError(
                f"save_pretrained: {', '.join(f'{name} = {value!r}' for name, value in others.items())}: not "
                "possible: a pipeline is saved to a folder, one safetensors file per component: leave it out."
            )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, component in self.components.items():
            component.save_pretrained(folder / name)
        self.save_config(folder)
        seal_folder(folder, self.components)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None = None, **kwargs: Any) -> Self:
        """Load what `save_pretrained` wrote; a folder without a manifest, as diffusers writes it, with a warning.

        Args:
            pretrained_model_name_or_path: the folder of a pipeline; None: the small model that comes with stdit.
            kwargs: components and settings to use instead of the saved ones; ``torch_dtype`` or ``dtype`` is that of
                the transformer.

        Raises:
            UserError: if the folder holds no pipeline or a damaged one, or torch_dtype and dtype differ.
            TypeError: for an unknown keyword.
        """
        given = pretrained_model_name_or_path
        folder = bundled_folder() if given is None else Path(given)
        # Each component checks its own folder, but for schedulers of diffusers: here the other files, once.
        if (
            not verify_if_sealed(folder, lambda name: "/" not in name or name.startswith("scheduler/"))
            and (folder / cls.config_name).is_file()
        ):
            logger.warning("pipeline %s has no %s: a damaged file would not be noticed", folder, META)
        recorded = read_json(folder / cls.config_name, "a pipeline")
        check_recorded(recorded, f"{folder / cls.config_name}: ")
        dtype = pop_dtype(kwargs)
        components = read_components(folder, kwargs, dtype)
        recorded = {"flow": read_flow(folder), **recorded}
        settings = {name: recorded[name] for name in (*VIDEO_SETTINGS, *_RECORDED) if name in recorded}
        return cls(**{**settings, **components, **kwargs})

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move everything to a device; a dtype is the transformer's alone (the codec has its own)."""
        if unknown := kwargs.keys() - {"device", "dtype", "silence_dtype_warnings"}:
            raise TypeError(
                f"STDiTPipeline.to() has no argument {sorted(unknown)[0]!r}: use device or dtype."
            )
        for value in (*args, kwargs.get("device"), kwargs.get("dtype")):
            if isinstance(value, torch.dtype):
                torch.nn.Module.to(self.transformer, value)  # diffusers' own warns needlessly
            elif value is not None and not isinstance(value, bool):
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

    @list_settings(dict.fromkeys(VIDEO_SETTINGS))
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str | None] | None = None,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        image: Image | Sequence[Image | None] | None = None,
        conditions: Sequence[FrameCondition] | Sequence[Sequence[FrameCondition]] = (),
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **settings: Any,
    ) -> Any:
        """Generate one video per prompt.

        Args:
            prompt: one caption, or B of them.
            negative_prompt: what guidance moves away from, one for all prompts or one per prompt; None: the learned
                null caption.
            generator: one for all prompts (drawn from in turn), or one per prompt, so that a video does not depend
                on the rest of its batch.
            image: the first frame, for all prompts or one per prompt: a PIL image; an array ``[H W 3]``, uint8 or in
                [0, 1]; or a tensor ``[3 H W]`` in [-1, 1]. Resized and cropped to the video's size.
            conditions: conditioning frames, for all prompts or a list per prompt; later ones overwrite earlier ones.
            output_type: pil, np, pt or latent: see `STDiTPipelineOutput`.
            return_dict: if False, return ``(frames,)``.
            callback_on_step_end: called as ``callback(pipe, step, timestep, {"latents": ...})`` after each step;
                latents in the dictionary that it returns replace those of the pipeline, but for conditioning frames.
            callback_on_step_end_tensor_inputs: names of the tensors passed to the callback.
            settings: ``num_frames``, ``height``, ``width``, ``fps``, ``num_inference_steps``, ``guidance_scale`` and
                the other fields of `VideoSettings`; one that is missing or None is the pipeline's (``pipe.config``).

        Returns:
            an `STDiTPipelineOutput`.

        Raises:
            UserError: if an argument breaks its rule.
            TypeError: for a setting that does not exist.
        """
        own = video_settings(STDiTPipeline.__call__, settings)
        video = own.resolved(self.config)
        self.check_inputs(prompt, video, output_type, callback_on_step_end_tensor_inputs)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = for_each_prompt(negative_prompt, len(prompts), "negative_prompt")
        own.check_used(video, next((text for text in negatives if text is not None), None))
        frame_conditions = conditions_of_prompts(image, conditions, len(prompts))
        generators = for_each_prompt(generator, len(prompts), "generator")
        num_frames, height, width = (int(video[name]) for name in ("num_frames", "height", "width"))

        device = self._execution_device
        shape = (self.codec.channels, *self.codec.latent_shape(num_frames, height, width))  # [C T H W]
        shift = self.flow.size_shift(shape[1], height, width) if video["shift"] is None else video["shift"]
        set_flow_timesteps(self.scheduler, int(video["num_inference_steps"]), shift, device)
        sigmas = self.scheduler.sigmas.to(device)
        scales = guidance_scales(sigmas, video)
        guided = any(scale != 1 for scale in scales) or guides_refinement(video)
        arguments = self.encode_prompt(prompts, negatives, guided, device)
        for name in ("fps", "height", "width"):
            rows = len(arguments["encoder_hidden_states"])
            arguments[name] = torch.full((rows,), float(video[name]), device=device)
        sharding = self.transformer.token_sharding(self.mesh.sp, *shape[1:])
        inputs = _ModelInputs(arguments, sharding, scales, float(video["guidance_rescale"]))

        latents, noise, max_noise_level = self.prepare_latents(
            shape, generators, frame_conditions, video, sigmas
        )
        latents = self.denoise(
            sharding.split(latents, dim=2),
            sharding.split(noise, dim=2),
            max_noise_level,
            inputs,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        if pairs := int(video["refine_pairs"]):
            level = max_noise_level.clamp(max=float(video["refine_level"]))
            noises = (
                sharding.split(torch.stack([draw_noise(shape, one) for one in generators]).to(device), dim=2)
                for _ in self.progress_bar(range(pairs))
            )
            latents = self.refine(latents, noises, level, inputs, float(video["refine_guidance_scale"]))
        if output_type == "latent":
            frames = sharding.gather(latents, 2, shape[1])
        else:
            pixels = self.decode_latents(latents, sharding, shape[1], num_frames, height, width)
            frames = VideoProcessor().postprocess_video(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return STDiTPipelineOutput(frames=frames) if return_dict else (frames,)

    def check_inputs(
        self, prompt: Any, settings: dict[str, Any], output_type: str, callback_inputs: Sequence[str]
    ) -> None:
        """Raise UserError if an argument of a call breaks its rule."""
        VideoSettings(**settings).check()
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not (isinstance(prompts, Sequence) and prompts and all(isinstance(text, str) for text in prompts)):
            raise UserError(f"prompt = {prompt!r}: must be a caption or a list of at least one.")
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type = {output_type!r}: must be one of {', '.join(OUTPUT_TYPES)}.")
        if unknown := set(callback_inputs) - set(self._callback_tensor_inputs):
            raise UserError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}: may only name "
                f"{self._callback_tensor_inputs}."
            )

    def encode_prompt(
        self, prompts: list[str], negatives: list[str | None], guided: bool, device: torch.device
    ) -> dict[str, Tensor]:
        """Encode the prompts, then, if guided, what guidance moves away from: the text arguments of the model.

        Returns:
            states ``[B L E]`` and mask ``[B L]``; with guidance ``[2B L E]``, ``[2B L]`` and ``drop_caption [2B]``,
            which is true where the negative prompt is None: the model replaces those states by the null caption.
        """
        texts = list(prompts)
        if guided:
            texts += [p if n is None else n for p, n in zip(prompts, negatives, strict=True)]
        distinct = list(dict.fromkeys(texts))
        onload(self.text_encoder)
        states, mask = self.text_encoder.encode(distinct)
        row = [distinct.index(text) for text in texts]
        encoded = {
            "encoder_hidden_states": states[row].to(device, self.transformer.dtype),
            "encoder_attention_mask": mask[row].to(device),
        }
        if guided:
            drop = [False] * len(prompts) + [negative is None for negative in negatives]
            encoded["drop_caption"] = torch.tensor(drop, device=device)
        return encoded

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        generators: Sequence[torch.Generator | None],
        conditions: Sequence[Sequence[FrameCondition]],
        settings: dict[str, Any],
        sigmas: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the noise, and encode the conditioning frames.

        Args:
            shape: of the latents of a video, C T H W.
            conditions: of each video.
            settings: complete settings of the call.

        Returns:
            latents ``[B C T H W]``, zero outside the conditioning frames; noise ``[B C T H W]``; and the noise level
            ``[B T]`` from which each latent frame is generated: 1 for a generated frame, 0 for one that is kept.

        Raises:
            UserError: if a condition lies outside the video or cannot be read, or no frame is left to generate.
        """
        noise = torch.stack([draw_noise(shape, one) for one in generators]).to(sigmas.device)
        latents = torch.zeros_like(noise)
        max_noise_level = torch.ones(len(noise), shape[1], device=sigmas.device)
        num_frames, height, width = (int(settings[name]) for name in ("num_frames", "height", "width"))
        fps = float(settings["fps"])
        for index, of_video in enumerate(conditions):
            for condition in of_video:
                condition = condition.resolved(num_frames, fps)
                video = load_frames(condition, fps, height, width)[None]  # [1 3 T H W]
                onload(self.codec)
                start, _ = condition.span(num_frames)
                first, encoded = self.codec.encode_span(video.to(latents.device), start, num_frames)
                place = slice(first, first + encoded.shape[2])
                latents[index, :, place], max_noise_level[index, place] = encoded[0], 1 - condition.strength
        patch_frames = self.transformer.config.patch_size[0]
        return latents, noise, check_noise_levels(max_noise_level, sigmas, num_frames, patch_frames)

    def denoise(
        self,
        latents: Tensor,
        noise: Tensor,
        max_noise_level: Tensor,
        inputs: "_ModelInputs",
        callback: "StepCallback | None",
        callback_inputs: Sequence[str],
    ) -> Tensor:
        """Carry noise (sigma 1) to data (sigma 0) by the scheduler's steps.

        A conditioning frame is shown to the model without noise until sigma has fallen to its ``max_noise_level
        [B T]``; from there on it is generated like the others. For the scheduler it moves along its own straight path
        until then, so that any solver, whatever it remembers of earlier steps, is right for all frames.

        Args:
            latents: of the conditioning frames, zero elsewhere: this rank's frames ``[B C T_n H W]``.
            noise: of the same shape.
        """
        split = inputs.sharding.split
        max_noise_level = _per_sample(max_noise_level)
        sigmas = self.scheduler.sigmas.to(latents.device)
        sample, shown = noise, latents
        for index, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            sigma = sigmas[index]
            generated = sigma <= max_noise_level  # [B T]
            free = per_frame(split(generated, dim=1))
            sample = torch.where(free, sample, torch.lerp(latents, noise, sigma))
            shown = torch.where(free, sample, latents)
            velocity = self.guided_velocity(shown, sigma * generated, inputs, inputs.guidance_scales[index])
            away = torch.where(free, -velocity, noise - latents)  # from data to noise
            sample = self.scheduler.step(away, timestep, sample, return_dict=False)[0]
            shown = torch.where(free, sample, latents)
            if callback is not None:
                tensors = {name: {"latents": shown}[name] for name in callback_inputs}
                changed = (callback(self, index, timestep, tensors) or {}).get("latents", shown)
                sample, shown = torch.where(free, changed, sample), torch.where(free, changed, latents)
        return shown

    def refine(
        self,
        latents: Tensor,
        noises: Iterable[Tensor],
        level: Tensor,
        inputs: "_ModelInputs",
        guidance_scale: float,
    ) -> Tensor:
        """Return the finished video x with the grain and the ragged outlines taken off that the steps left.

        Each pair of opposite noise gives two noisy videos, ``(1 - t) x + t n`` and ``(1 - t) x - t n``; the mean of
        the model's estimates of the clean video takes the place of x, and the next pair begins from it. What an
        estimate owes to the noise n is odd in n to first order and cancels (antithetic variates: Hammersley & Morton
        1956); repeated, estimates climb to where videos are most probable at noise t (mean shift: Comaniciu & Meer
        2002).

        Args:
            latents: this rank's frames ``[B C T_n H W]``.
            noises: of each pair, of the same shape.
            level: the noise level t of each frame, ``[B T]``; one of 0 stays as it is.
        """
        level = _per_sample(level)
        t = per_frame(inputs.sharding.split(level, dim=1))
        for noise in noises:
            estimates = []
            for signed in (noise, -noise):
                noisy = torch.lerp(latents, signed, t)
                estimates.append(noisy + t * self.guided_velocity(noisy, level, inputs, guidance_scale))
            latents = torch.where(t > 0, (estimates[0] + estimates[1]) / 2, latents)
        return latents

    def guided_velocity(self, x_t: Tensor, t: Tensor, inputs: "_ModelInputs", scale: float) -> Tensor:
        """Return ``v_uncond + g (v_cond - v_uncond)`` (Ho & Salimans 2022, arXiv:2207.12598, equation 6).

        Both are computed in one batch, or on two ranks; at g = 1 only the conditional one. ``x_t`` is this rank's
        frames, ``t [B T]`` (or ``[B 1]``) the noise levels of all frames.
        """
        arguments, sharding, group = inputs.arguments, inputs.sharding, self.mesh.cfg
        if scale == 1:
            own = {name: value[: len(x_t)] for name, value in arguments.items()}
            return self.predict_velocity(x_t, t, own, sharding)
        if group.size == 1:
            both = self.predict_velocity(x_t.repeat(2, 1, 1, 1, 1), t.repeat(2, 1), arguments, sharding)
        else:
            own = {name: value.chunk(2)[group.rank] for name, value in arguments.items()}
            both = all_gather(self.predict_velocity(x_t, t, own, sharding), group, 0, [len(x_t)] * 2)
        conditional, unconditional = both.chunk(2)
        velocity = unconditional + scale * (conditional - unconditional)
        if not inputs.guidance_rescale:
            return velocity
        of_rank = torch.stack([sample_moments(conditional), sample_moments(velocity)])[None]
        sums = all_gather(of_rank, sharding.group, 0, [1] * sharding.group.size).sum(0)  # over all frames
        before, after = (standard_deviation(one) for one in sums)
        return rescale_guidance(velocity, before, after, inputs.guidance_rescale)

    def predict_velocity(
        self, x_t: Tensor, t: Tensor, arguments: dict[str, Tensor], sharding: TokenSharding
    ) -> Tensor:
        """Call the model: the velocity of this rank's frames ``x_t`` at the noise levels ``t`` of all frames."""
        level = sharding.split(t, dim=1)
        model_input = self.flow.scale_model_input(x_t, level).to(self.transformer.dtype)
        output = self.transformer(
            hidden_states=model_input, timestep=1000 * t, **arguments, sharding=sharding
        ).sample
        return self.flow.velocity(output.float(), x_t, level)

    def decode_latents(
        self,
        latents: Tensor,
        sharding: TokenSharding,
        latent_frames: int,
        num_frames: int,
        height: int,
        width: int,
    ) -> Tensor:
        """Decode this rank's latents to the pixels ``[B 3 T H W]`` of all frames, in [-1, 1], one video at a time.

        Each rank decodes its own frames if the codec can decode them alone, else all of them.
        """
        onload(self.codec)
        alone = self.codec.independent_frames
        if not alone:
            latents = sharding.gather(latents, 2, latent_frames)
        frames = None if alone else num_frames
        pixels = torch.cat([self.codec.decode(one[None], frames, height, width) for one in latents])
        if alone:
            per_rank = [
                count * self.codec.stride[0] for count in sharding.latent_frames_per_rank(latent_frames)
            ]
            pixels = all_gather(pixels, sharding.group, 2, per_rank)
        return pixels[:, :, :num_frames].float()


def _per_sample(levels: Tensor) -> Tensor:
    """Return noise levels ``[B T]`` as ``[B 1]`` where all frames share one, which is cheaper for the model."""
    return levels[:, :1] if (levels == levels[:, :1]).all() else levels
