"""STDiTPipeline: from prompts and conditioning frames to videos.

Letters: B prompts, C channels, T latent frames, H height, W width, L text tokens, E width of the text states.
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from stdit.checkpoint_files import META, Sealed, read_json, seal_folder
from stdit.codecs.base import VideoCodec
from stdit.codecs.config import CODECS
from stdit.codecs.loading import quiet
from stdit.codecs.text import TextEncoder
from stdit.codecs.tiling import Ranks, TilePlan
from stdit.diffusion.config import FlowConfig, flow_config, flow_settings
from stdit.diffusion.flow import FlowObjective, per_frame
from stdit.errors import UserError
from stdit.lora.files import check_adapter, local_adapter, pipeline_state
from stdit.models.stdit import STDiT
from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.sequence.collectives import all_gather
from stdit.parallel.sequence.sharding import TokenSharding
from stdit.pipelines.bundled import bundled_folder
from stdit.pipelines.components import (
    OWN_BASES,
    check_can_be_saved,
    check_quantisation,
    verify_pipeline,
    wrap_text_encoder,
    wrap_vae,
)
from stdit.pipelines.conditions import FrameCondition, check_strengths, load_frames
from stdit.pipelines.config import (
    PIPELINE_DEFAULTS,
    VIDEO_SETTINGS,
    VideoSettings,
    check_keywords,
    check_recorded,
    check_scales,
    list_settings,
    video_settings,
)
from stdit.pipelines.guided_model import GuidedModel
from stdit.pipelines.images import Image
from stdit.pipelines.inputs import (
    changes_of_callback,
    check_embeds,
    check_latents,
    check_noise_levels,
    conditions_of_prompts,
    draw_noise,
    for_each_prompt,
    guidance_scale_of_step,
)
from stdit.pipelines.model_calls import ModelCalls
from stdit.pipelines.output_cache import THRESHOLDS, OutputCache
from stdit.pipelines.schedule import Schedule
from stdit.pipelines.steps import BroadcastSteps, EveryStep
from stdit.pipelines.text_rows import encode_texts, repeated, repeated_states, text_rows
from stdit.pipelines.untrained import warn_of_steps

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
WRAPPED = {"vae": ("codec", "flow"), **dict.fromkeys(("text_encoder", "tokenizer"), ("prompt_encoder",))}
"""By component, what is made of it and kept."""
CLEAN = "clean_latents"
"""What a callback may read, but not replace."""
StepCallback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
PairCallback = Callable[[Any, int, Tensor], None]


@dataclass
class STDiTPipelineOutput(BaseOutput):
    """Result of a call."""

    frames: Any
    """By output_type: a list of PIL images per prompt; float array ``[B T H W 3]`` or tensor ``[B T 3 H W]`` in
    [0, 1]; or latents ``[B C T H W]``."""
    calls: list[ModelCalls]
    """Model calls of each video."""


class STDiTPipeline(Sealed, DiffusionPipeline, CogVideoXLoraLoaderMixin):
    """Generate videos from prompts, and from conditioning frames, with an STDiT.

    LoRAs are loaded and saved by diffusers' class for a pipeline with one transformer, whichever that is.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", CLEAN]

    transformer: STDiT
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: SchedulerMixin

    @list_settings(PIPELINE_DEFAULTS)
    def __init__(
        self,
        transformer: STDiT,
        vae: ModelMixin,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: SchedulerMixin,
        *,
        flow: FlowConfig | Mapping[str, Any] | None = None,
        text: Mapping[str, Any] | None = None,
        vae_import: str | None = None,
        step: int | None = None,
        trained_sizes: Sequence[dict[str, Any]] | None = None,
        trained_steps: Sequence[int] | None = None,
        lineage: Sequence[dict[str, Any]] | None = None,
        vocabulary: str | None = None,
        trigger: str | None = None,
        **settings: Any,
    ) -> None:
        """Assemble a pipeline. A component may be None as long as no call needs it.

        Args:
            vae: a VAE of diffusers, or a codec of stdit.
            text_encoder: an encoder of transformers, or a text encoder of stdit.
            tokenizer: of the encoder of transformers; None for one of stdit.
            scheduler: `stdit.RectifiedFlow`, or another scheduler of diffusers that can do flow matching.
            flow: the objective of the training, which says what the model's output means; a mapping has the fields of
                `FlowConfig`. None: the velocity.
            text: how an encoder of transformers is used: ``max_length`` in tokens, the ``layers`` whose states are
                concatenated, and ``clean_captions``, as in `stdit.codecs.TextEncoderConfig`.
            vae_import: the module that registers the class of the VAE, for one that a user added.
            step: training step of the weights.
            trained_sizes: the sizes that the model was trained on, each with num_frames, height, width, fps and the
                number of clips.
            trained_steps: the numbers of steps in which a few-step student learned to make a video.
            lineage: changes of data and settings in their training, each with step, changes, and hashes of the
                experiment before and after.
            vocabulary: the words, in lower case and with spaces between them, of the captions that the model was
                trained on.
            trigger: the word in all of these captions that prompts use for what the clips show.
            settings: the fields of `VideoSettings`: defaults of a call, such as the size that the model was trained
                on, and sampling settings that suit it.

        Raises:
            TypeError: for a setting that does not exist.
            UserError: for a VAE of an unknown class, or a model that does not fit ``text``.
        """
        super().__init__()
        self._wrapped: dict[str, Any] = {}
        codec = vae if isinstance(vae, VideoCodec) else None
        if codec is not None:
            vae = codec.component()
        if isinstance(text_encoder, TextEncoder):
            text_encoder, tokenizer, used = text_encoder.components()
            text = {**used, **(text or {})}
        self.register_modules(
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
        )
        if codec is not None:
            self._wrapped["codec"] = codec
        self._flow_config = flow if isinstance(flow, FlowConfig) else flow_config(flow or {})
        own = video_settings(STDiTPipeline.__init__, settings)
        recorded = {
            "flow": flow_settings(self._flow_config),
            "text": dict(text or {}),
            "vae_import": vae_import or CODECS.module(type(vae).__name__),
            "step": step,
            "trained_sizes": [dict(size) for size in trained_sizes] if trained_sizes else None,
            "trained_steps": list(trained_steps) if trained_steps else None,
            "lineage": [dict(change) for change in lineage] if lineage else None,
            "vocabulary": vocabulary,
            "trigger": trigger,
        }
        defaults = own.resolved(PIPELINE_DEFAULTS)
        VideoSettings(**defaults).check()
        self.register_to_config(**defaults, **recorded)
        self.mesh, self.video_processor = Mesh(), VideoProcessor()
        self._guidance_scale: float = self.config["guidance_scale"]
        self._warned_of: set[tuple[int, str | None]] = set()
        self._attention_kwargs: dict[str, Any] | None = None
        self._interrupt, self._current_timestep, self._num_timesteps = False, None, 0
        if vae is not None:
            _ = self.flow  # raises if the objective needs what the codec does not know

    def share(self, mesh: Mesh) -> None:
        """Divide each call among the ranks of a mesh: frames among ``sp``, the two halves of guidance among ``cfg``.

        All these ranks must then make the same calls, and all get the whole result. A callback gets the latents of
        its rank.
        """
        self.mesh = mesh

    @property
    def codec(self) -> VideoCodec:
        """The ``vae`` as a codec of videos. Raises UserError if there is none, or of an unknown class."""
        if self.vae is None:
            raise UserError("this pipeline has no vae, but latents need one: pass it to STDiTPipeline.")
        codec: VideoCodec = self._wrap("codec", partial(wrap_vae, module=self.config["vae_import"]), self.vae)
        return codec

    @property
    def prompt_encoder(self) -> TextEncoder:
        """The ``text_encoder`` with its ``tokenizer``. Raises UserError if there is none."""
        if self.text_encoder is None:
            raise UserError("this pipeline has no text_encoder: pass prompt_embeds instead of a prompt.")
        wrap = partial(wrap_text_encoder, settings=self.config["text"])
        encoder: TextEncoder = self._wrap("prompt_encoder", wrap, self.text_encoder, self.tokenizer)
        return encoder

    def _wrap(self, name: str, wrap: Callable[..., Any], *components: Any) -> Any:
        """Return ``wrap(*components)``, made once for the same components."""
        if name not in self._wrapped:
            self._wrapped[name] = wrap(*components)
        return self._wrapped[name]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; if it is a component that is wrapped, let go of the one before."""
        for wrapped in WRAPPED.get(name, ()):
            self._wrapped.pop(wrapped, None)
        super().__setattr__(name, value)

    @property
    def flow(self) -> FlowObjective:
        """The objective of the training, with the variance of this pipeline's latents."""
        flow: FlowObjective = self._wrap("flow", self._make_flow)
        return flow

    def _make_flow(self) -> FlowObjective:
        variance = self.codec.latent_variance  # copied: an offloaded codec has no values between calls
        return FlowObjective(self._flow_config, None if variance is None else variance.clone())

    @property
    def guidance_scale(self) -> float:
        """Of the call in progress, or of the last one; a callback may change ``_guidance_scale`` of a guided call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the guidance scale is other than 1."""
        return self._guidance_scale != 1

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the call in progress, or of the last one."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Any:
        """The timestep of the step in progress; None between calls."""
        return self._current_timestep

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """What the call in progress, or the last one, passes to the model's attention."""
        return self._attention_kwargs

    @property
    def interrupt(self) -> bool:
        """Whether the call in progress ends after this step; a callback sets ``_interrupt``."""
        return self._interrupt

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: Any, **options: Any) -> Any:
        """Read an adapter for `load_lora_weights`, as diffusers does, or a local file of kohya's scripts or ComfyUI.

        Raises:
            UserError: such a file is damaged, or no adapter.
        """
        file = local_adapter(pretrained_model_name_or_path_or_dict, options.get("weight_name"))
        if file is None or (found := pipeline_state(file)) is None:
            return super().lora_state_dict(pretrained_model_name_or_path_or_dict, **options)
        return found if options.get("return_lora_metadata") else found[0]

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: Any, *args: Any, other_base: bool = False, **options: Any
    ) -> None:
        """Load an adapter as diffusers does; a local file is checked first.

        Args:
            other_base: also one that says that it was trained on other weights. That is known where those of the
                transformer are in fp32.

        Raises:
            UserError: the file is damaged, no adapter, or of another architecture or base.
        """
        file = local_adapter(pretrained_model_name_or_path_or_dict, options.get("weight_name"))
        if file is not None:
            check_adapter(file, self.transformer, other_base)
        super().load_lora_weights(pretrained_model_name_or_path_or_dict, *args, **options)
        self.transformer.train(
            self.transformer.training
        )  # peft's layers begin in training mode, with their dropout

    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> None:
        """Write the components, ``model_index.json`` and, last, a manifest of all; ``options`` are diffusers'.

        Codecs and text encoders of stdit are written by themselves; weights that a package ships are only named.
        """
        if self.transformer is not None:
            self.transformer.check_has_no_adapters()  # before anything is written
        check_can_be_saved(self.components)
        own = {name: base for name, base in OWN_BASES.items() if isinstance(getattr(self, name), base)}
        before = {name: self.config[name] for name in own}
        self.register_to_config(**{name: ("stdit", base.__name__) for name, base in own.items()})
        try:
            with quiet("transformers"):  # progress bars of files
                super().save_pretrained(str(save_directory), *args, **options)
        finally:
            self.register_to_config(**before)
        self._seal(Path(save_directory))

    def _seal(self, folder: Path) -> None:
        seal_folder(folder, [name for name in self.components if (folder / name).is_dir()])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None = None, **options: Any) -> Self:
        """Load what `save_pretrained` wrote; a folder without a manifest, as diffusers writes it, with a warning.

        Args:
            pretrained_model_name_or_path: the folder of a pipeline, or an id on the hub; None: the small model that
                comes with stdit.
            options: those of diffusers; also components and settings to use instead of the saved ones. A dtype is
                that of all components, but codecs of stdit compute in fp32.

        Raises:
            UserError: if the folder holds no pipeline, or a damaged one; for a quantisation of components that there
                are not.
            TypeError: for a keyword that is almost a setting.
        """
        given = pretrained_model_name_or_path
        source = bundled_folder() if given is None else given
        check_keywords(cls.from_pretrained, options.keys() - inspect.signature(cls).parameters.keys())
        if (quantisation := options.get("quantization_config")) is not None:
            check_quantisation(quantisation, cls._get_signature_keys(cls)[0])
        if given is None or Path(given).is_dir():
            folder = Path(source)
            if not verify_pipeline(folder, cls.config_name):
                logger.warning("pipeline %s has no %s: a damaged file would not be noticed", folder, META)
            recorded = read_json(folder / cls.config_name, "a pipeline")
            check_recorded(recorded, f"{folder / cls.config_name}: ")
        pipe: Self = super().from_pretrained(str(source), **options)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: Any) -> Self:
        """Make a pipeline of the components and settings of another, as diffusers does.

        Args:
            options: those of diffusers; also components and settings to use instead of the other's.
        """
        any_class = {name: part for name, part in pipeline.components.items() if name in OWN_BASES}
        pipe: Self = super().from_pipe(pipeline, **any_class | options)
        return pipe

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[Any, ...]]:
        """Leave the types of settings to `VideoSettings`: diffusers knows no Literal, and JSON no tuple."""
        types = dict.fromkeys(inspect.signature(cls.__init__).parameters, (inspect.Signature.empty,))
        return types | {"transformer": (STDiT,)}

    # ---- the call ----

    @list_settings(dict.fromkeys(VIDEO_SETTINGS))
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        *,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        image: Image | Sequence[Image | None] | None = None,
        conditions: Sequence[FrameCondition] | Sequence[Sequence[FrameCondition]] = (),
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback_on_pair_end: PairCallback | None = None,
        max_sequence_length: int | None = None,
        **settings: Any,
    ) -> Any:
        """Generate one video per prompt, or several.

        Args:
            prompt: one caption, or B of them.
            negative_prompt: what guidance moves away from, one for all prompts or one per prompt; None: the learned
                null caption.
            num_videos_per_prompt: V videos of each prompt, beside each other in the result, which has B V.
            generator: one for all videos (drawn from in turn), or one per video, so that a video does not depend
                on the rest of its batch.
            latents: the noise to begin with, ``[B V, C, T', H', W']``, instead of noise from the generators.
            prompt_embeds: text states ``[B L E]`` instead of prompts, as `encode_prompt` returns them.
            prompt_attention_mask: their mask ``[B L]``; None: all are tokens.
            negative_prompt_embeds, negative_prompt_attention_mask: likewise, instead of negative prompts, for all
                prompts.
            image: the first frame, for all prompts or one per prompt: a PIL image; an array ``[H W 3]``, uint8 or in
                [0, 1]; or a tensor ``[3 H W]`` in [-1, 1]. Resized and cropped to the video's size.
            conditions: conditioning frames, for all prompts or a list per prompt; later ones overwrite earlier ones.
            output_type: pil, np, pt or latent: see `STDiTPipelineOutput`.
            return_dict: if False, return ``(frames,)``.
            attention_kwargs: for the model; its ``scale`` is that of all LoRAs.
            callback_on_step_end: called as ``callback(pipe, step, timestep, {"latents": ...})`` after each step;
                tensors in the dictionary that it returns replace those of the pipeline, but for conditioning frames.
                To end the call with the latents of this step, it sets ``pipe._interrupt = True``. It may set
                ``pipe._guidance_scale`` for the later steps (0, as in diffusers' callbacks, and 1 end guidance), but
                not from 1 to another: a call that begins without guidance has no negative prompts.
            callback_on_step_end_tensor_inputs: names of the tensors passed to the callback: latents, prompt_embeds,
                negative_prompt_embeds; clean_latents, the video that the step aimed at, of all ranks
                ``[B C T H W]``, to be read only. A callback of diffusers' classes names its own.
            callback_on_pair_end: called as ``callback(pipe, pair, clean_latents)`` after each pair of the refinement,
                with its place from 0 on and the video so far. It may set ``pipe._interrupt``, too.
            max_sequence_length: largest number of tokens of a prompt that is encoded; None: that of the text encoder.
            settings: ``num_frames``, ``height``, ``width``, ``fps``, ``num_inference_steps``, ``guidance_scale`` and
                the other fields of `VideoSettings`; one that is missing or None is the pipeline's (``pipe.config``).

        Returns:
            an `STDiTPipelineOutput`.

        Raises:
            UserError: if an argument breaks its rule.
            TypeError: for a setting that does not exist.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        own = video_settings(STDiTPipeline.__call__, settings)
        video = own.resolved(self.config)
        count = self.check_inputs(
            prompt,
            negative_prompt,
            video,
            output_type,
            callback_on_step_end_tensor_inputs,
            num_videos_per_prompt,
            max_sequence_length,
            attention_kwargs,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
        )
        prompts = [prompt] if isinstance(prompt, str) else prompt
        negatives = for_each_prompt(negative_prompt, count, "negative_prompt")
        own.check_used(video, None)
        own.check_saving(video)
        takes = self.transformer.config.guidance_range
        has_negatives = any(text is not None for text in negatives) or negative_prompt_embeds is not None
        own.check_guidance(video, takes, has_negatives)
        if (asked := (video["num_inference_steps"], video["solver"])) not in self._warned_of:
            self._warned_of.add(asked)
            warn_of_steps(video, self.config)
        frame_conditions = repeated(conditions_of_prompts(image, conditions, count), num_videos_per_prompt)
        if video["pab"]:
            check_strengths([one for of_video in frame_conditions for one in of_video])
        generators = for_each_prompt(generator, count * num_videos_per_prompt, "generator")
        num_frames, height, width = (int(video[name]) for name in ("num_frames", "height", "width"))

        device = self._execution_device
        shape = (self.codec.channels, *self.codec.latent_shape(num_frames, height, width))  # [C T H W]
        if latents is not None:
            check_latents(latents, (len(generators), *shape))
        schedule = Schedule.of(video, shape[1], self.flow, self.scheduler, takes, device)
        scheduler, guided = schedule.scheduler, schedule.guided
        self._guidance_scale, self._attention_kwargs = float(video["guidance_scale"]), attention_kwargs
        self._interrupt, self._num_timesteps = False, len(scheduler.timesteps)
        scale_of_step = partial(guidance_scale_of_step, settings=video)
        embeds = self.encode_prompt(
            prompts,
            negatives,
            guided,
            num_videos_per_prompt,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            max_sequence_length,
            device,
        )
        dropped = [negative_prompt_embeds is None and text is None for text in negatives]
        shared: dict[str, Any] = {
            name: torch.full((1,), float(video[name]), device=device) for name in ("fps", "height", "width")
        }
        if attention_kwargs is not None:
            shared["attention_kwargs"] = attention_kwargs
        rows = len(generators) * (2 if guided and self.mesh.cfg.size == 1 else 1)
        sharding = self.transformer.token_sharding(self.mesh.sp, *shape[1:], rows)
        model = GuidedModel(
            self.transformer,
            self.flow,
            sharding,
            self.mesh.cfg,
            text=text_rows(*embeds, repeated(dropped, num_videos_per_prompt) if guided else None),
            shared=shared,
            guided=guided,
            guidance_rescale=float(video["guidance_rescale"]),
        )
        if latents is None:
            latents = torch.stack([draw_noise(shape, one) for one in generators])
        noise = latents.to(device, torch.float32)
        sigmas = scheduler.sigmas.to(device)
        conditioned, max_noise_level = self.prepare_conditions(noise, frame_conditions, video, sigmas)
        steps = self._plan_steps(model, video, scheduler, max_noise_level)
        try:
            latents = self.denoise(
                sharding.split(conditioned, dim=2),
                sharding.split(noise, dim=2),
                max_noise_level,
                scheduler,
                steps,
                scale_of_step,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
            )
            if (pairs := int(video["refine_pairs"])) and not self._interrupt:
                level = max_noise_level.clamp(max=float(video["refine_level"]))
                noises = (
                    sharding.split(
                        torch.stack([draw_noise(shape, one) for one in generators]).to(device), dim=2
                    )
                    for _ in self.progress_bar(range(pairs))
                )
                refine_scale = float(video["refine_guidance_scale"])
                latents = self.refine(latents, noises, level, model, refine_scale, callback_on_pair_end)
            if output_type == "latent":
                frames = sharding.gather(latents, 2, shape[1])
            else:
                pixels = self.decode_latents(latents, sharding, shape[1], num_frames, height, width)
                if not pixels.isfinite().all():
                    raise UserError(
                        "the videos have values that are NaN or infinite: lower the weights of the adapters, or "
                        "compute in fp32."
                    )
                frames = self.video_processor.postprocess_video(pixels, output_type=output_type)
        finally:  # also after an error in a callback: caches and offloaded parts begin anew
            self._current_timestep = None
            self.maybe_free_model_hooks()
        return STDiTPipelineOutput(frames=frames, calls=model.calls) if return_dict else (frames,)

    def check_inputs(
        self,
        prompt: Any,
        negative_prompt: Any,
        settings: dict[str, Any],
        output_type: str,
        callback_inputs: Sequence[str],
        num_videos_per_prompt: int,
        max_sequence_length: int | None,
        attention_kwargs: Mapping[str, Any] | None = None,
        **embeds: Tensor | None,
    ) -> int:
        """Return the number of prompts; raise UserError if an argument of a call breaks its rule.

        Args:
            settings: complete settings of the call.
            embeds: text states and their masks, by the names of the call's arguments.
        """
        VideoSettings(**settings).check()
        states = embeds["prompt_embeds"]
        if (prompt is None) == (states is None):
            raise UserError(
                f"prompt = {prompt!r:.80}, prompt_embeds = {'None' if states is None else 'a tensor'}: pass one of "
                "them."
            )
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if prompt is not None and not (
            isinstance(prompts, Sequence) and prompts and all(isinstance(text, str) for text in prompts)
        ):
            raise UserError(f"prompt = {prompt!r}: must be a caption or a list of at least one.")
        if negative_prompt is not None and embeds["negative_prompt_embeds"] is not None:
            raise UserError(
                f"negative_prompt = {negative_prompt!r:.80}, negative_prompt_embeds = a tensor: pass one of them."
            )
        if max_sequence_length is not None and prompt is None and negative_prompt is None:
            raise UserError(
                f"max_sequence_length = {max_sequence_length} would have no effect: prompt_embeds are encoded "
                "already: give it to encode_prompt."
            )
        if odd := [name for name in attention_kwargs or () if name != "scale"]:
            raise UserError(
                f"attention_kwargs has {', '.join(map(str, odd))}: may only have scale, that of all LoRAs."
            )
        model = self.transformer.config
        count = None if prompts is None else len(prompts)
        count = check_embeds(embeds, count, model.caption_channels, model.model_max_length)
        if type(num_videos_per_prompt) is not int or num_videos_per_prompt < 1:
            raise UserError(
                f"num_videos_per_prompt = {num_videos_per_prompt!r}: must be a whole number, at least 1."
            )
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type = {output_type!r}: must be one of {', '.join(OUTPUT_TYPES)}.")
        if unknown := set(callback_inputs) - set(self._callback_tensor_inputs):
            raise UserError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}: may only name "
                f"{self._callback_tensor_inputs}."
            )
        return count

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str | None] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int | None = None,
        device: torch.device | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Encode what of prompts and negative prompts is not given as states.

        Args:
            negative_prompt: None, for all or in a list: the learned null caption.
            do_classifier_free_guidance: whether negative prompts are used.

        Returns:
            text states ``[B V, L, E]`` and mask ``[B V, L]`` of the prompts, and those of the negative prompts: None
            without guidance, or if all of them are the learned null caption, which has no states. Where only some
            are, their rows have the states of an empty text: a call with these as ``negative_prompt_embeds`` is
            guided by that; one with the negative prompts themselves by the null caption.

        Raises:
            UserError: if prompts are given and there is no text encoder, or max_sequence_length is too large.
        """
        device = device or self._execution_device
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        count = len(prompts if prompt_embeds is None else prompt_embeds)
        given = for_each_prompt(negative_prompt, count, "negative_prompt")
        needed = do_classifier_free_guidance and negative_prompt_embeds is None
        negatives = (
            [text or "" for text in given] if needed and any(text is not None for text in given) else []
        )
        if texts := [*prompts, *negatives]:
            encoder = self._prompt_encoder_for(max_sequence_length)
            states, mask = (tensor.to(device) for tensor in encode_texts(encoder, texts))
            if prompts:
                prompt_embeds, prompt_attention_mask = states[:count], mask[:count]
            if negatives:
                negative_prompt_embeds, negative_prompt_attention_mask = states[-count:], mask[-count:]
        assert prompt_embeds is not None
        dtype = prompt_embeds.dtype if self.transformer is None else self.transformer.dtype
        prompt_embeds, prompt_attention_mask = repeated_states(
            prompt_embeds.to(device, dtype), prompt_attention_mask, num_videos_per_prompt
        )
        if negative_prompt_embeds is not None:
            negative_prompt_embeds, negative_prompt_attention_mask = repeated_states(
                negative_prompt_embeds.to(device, dtype),
                negative_prompt_attention_mask,
                num_videos_per_prompt,
            )
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    def _prompt_encoder_for(self, max_sequence_length: int | None) -> TextEncoder:
        """Return the text encoder with this largest number of tokens. Raises UserError if the model reads fewer."""
        if max_sequence_length is None:
            return self.prompt_encoder
        most = None if self.transformer is None else self.transformer.config.model_max_length
        if most is not None and not 2 <= max_sequence_length <= most:
            raise UserError(
                f"max_sequence_length = {max_sequence_length}: must be 2 to {most}, which the model reads."
            )
        return self.prompt_encoder.with_max_length(max_sequence_length)

    def prepare_conditions(
        self,
        noise: Tensor,
        conditions: Sequence[Sequence[FrameCondition]],
        settings: dict[str, Any],
        sigmas: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Encode the conditioning frames.

        Args:
            noise: of all videos, ``[B C T H W]``.
            conditions: of each video.
            settings: complete settings of the call.

        Returns:
            latents ``[B C T H W]``, zero outside the conditioning frames; and the noise level ``[B T]`` from which
            each latent frame is generated: 1 for a generated frame, 0 for one that is kept.

        Raises:
            UserError: if a condition lies outside the video or cannot be read, or no frame is left to generate.
        """
        latents = torch.zeros_like(noise)
        max_noise_level = torch.ones(len(noise), noise.shape[2], device=noise.device)
        num_frames, height, width = (int(settings[name]) for name in ("num_frames", "height", "width"))
        fps = float(settings["fps"])
        for index, of_video in enumerate(conditions):
            for condition in of_video:
                condition = condition.resolved(num_frames, fps)
                video = load_frames(condition, fps, height, width)[None]  # [1 3 T H W]
                start, _ = condition.span(num_frames)
                first, encoded = self.codec.encode_span(video.to(latents.device), start, num_frames)
                place = slice(first, first + encoded.shape[2])
                latents[index, :, place], max_noise_level[index, place] = encoded[0], 1 - condition.strength
        patch_frames = self.transformer.config.patch_size[0]
        return latents, check_noise_levels(max_noise_level, sigmas, num_frames, patch_frames)

    def _plan_steps(
        self, model: GuidedModel, settings: dict[str, Any], scheduler: Any, max_noise_level: Tensor
    ) -> EveryStep:
        """Return how the steps of a call get their velocities."""
        ranges, cache = settings["pab"], settings["cache"]
        if not ranges and cache == "off":
            return EveryStep(model)
        if self.transformer.is_cache_enabled:
            raise UserError(
                f"{f'pab = {ranges}' if ranges else f'cache = {cache}'}: a cache of diffusers is enabled, too: use "
                "one of them: leave this out, or call pipe.transformer.disable_cache()."
            )
        if ranges:
            return BroadcastSteps(model, ranges, settings["pab_timesteps"], scheduler.timesteps.tolist())
        return OutputCache(model, THRESHOLDS.get(cache, cache), scheduler.sigmas.tolist(), max_noise_level)

    def denoise(
        self,
        latents: Tensor,
        noise: Tensor,
        max_noise_level: Tensor,
        scheduler: Any,
        steps: EveryStep,
        scale_of_step: Callable[[float, float, int], float],
        callback: StepCallback | None,
        callback_inputs: Sequence[str],
    ) -> Tensor:
        """Carry noise (sigma 1) to data (sigma 0) by the scheduler's steps.

        A conditioning frame is shown to the model without noise until sigma has fallen to its ``max_noise_level
        [B T]``; from there on it is generated like the others. For the scheduler it moves along its own straight path
        until then, so that any solver, whatever it remembers of earlier steps, is right for all frames.

        Args:
            latents: of the conditioning frames, zero elsewhere: this rank's frames ``[B C T_n H W]``.
            noise: of the same shape.
            steps: the model, and what it remembers of earlier steps.
        """
        model, split = steps.model, steps.model.sharding.split
        latent_frames, max_noise_level = max_noise_level.shape[1], _per_sample(max_noise_level)
        sigmas = scheduler.sigmas.to(latents.device)
        levels = sigmas.tolist()
        sample, shown = noise, latents
        for index, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
            sigma = sigmas[index]
            generated = sigma <= max_noise_level  # [B T]
            free = per_frame(split(generated, dim=1))
            sample = torch.where(free, sample, torch.lerp(latents, noise, sigma))
            noisy = torch.where(free, sample, latents)
            self._current_timestep = timestep
            scale = scale_of_step(self._guidance_scale, levels[index], index // scheduler.order)
            velocity = steps.velocity(noisy, sigma * generated, scale)
            away = torch.where(free, -velocity, noise - latents)  # from data to noise
            sample = scheduler.step(away, timestep, sample, return_dict=False)[0]
            shown = torch.where(free, sample, latents)
            if callback is not None:
                given, guidance = {"latents": shown, **model.embeds()}, self._guidance_scale
                if CLEAN in callback_inputs:
                    clean = torch.where(free, noisy + sigma * velocity, latents)
                    given[CLEAN] = model.sharding.gather(clean, 2, latent_frames)
                asked: dict[str, Any] = {name: given.get(name) for name in callback_inputs}
                returned = callback(self, index, timestep, asked)
                changed = changes_of_callback(returned, given, self._callback_tensor_inputs, read_only=CLEAN)
                if self._guidance_scale == 0 != guidance:  # so diffusers' callbacks end guidance
                    self._guidance_scale = 1.0
                if model.takes_scale:
                    check_scales([self._guidance_scale], self.transformer.config.guidance_range)
                elif not model.guided and self._guidance_scale not in (guidance, 1):
                    raise UserError(
                        f"callback_on_step_end set _guidance_scale from {guidance} to {self._guidance_scale}, but "
                        "this call began without guidance, and has no negative prompts: begin with another "
                        "guidance_scale than 1."
                    )
                if changed:
                    steps.forget()
                sample = torch.where(free, changed.pop("latents", shown), sample)
                if changed:
                    model.set_embeds(changed)
                shown = torch.where(free, sample, latents)
            if self._interrupt:
                break
        return shown

    def refine(
        self,
        latents: Tensor,
        noises: Iterable[Tensor],
        level: Tensor,
        model: GuidedModel,
        guidance_scale: float,
        callback: PairCallback | None = None,
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
        latent_frames, level = level.shape[1], _per_sample(level)
        t = per_frame(model.sharding.split(level, dim=1))
        for pair, noise in enumerate(noises):
            estimates = []
            for signed in (noise, -noise):
                noisy = torch.lerp(latents, signed, t)
                estimates.append(noisy + t * model.velocity(noisy, level, guidance_scale))
            latents = torch.where(t > 0, (estimates[0] + estimates[1]) / 2, latents)
            if callback is not None:
                callback(self, pair, model.sharding.gather(latents, 2, latent_frames))
            if self._interrupt:
                break
        return latents

    @property
    def decodes_alone(self) -> bool:
        """Whether each rank decodes its own frames: the codec can decode them without the others."""
        # A later part of causal latents would be decoded as if it began with the first frame.
        return self.codec.independent_frames and not self.codec.causal_first_frame

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

        In tiles, each rank decodes some of them. A whole video each rank decodes for itself, or its own frames of it
        if the codec can decode them alone.
        """
        codec, ranks, size = self.codec, Ranks(self.mesh.sp, self.mesh.cfg), (num_frames, height, width)
        plan = self.decoding_plan(latents.shape[0], (latent_frames, *latents.shape[3:]), *size)
        # A later part of causal latents would be decoded as if it began with the first frame.
        alone = plan.whole and self.decodes_alone
        if not alone:
            latents = sharding.gather(latents, 2, latent_frames)
            videos = [codec.decode(one[None], *size, plan, ranks) for one in latents]
            return torch.cat(videos).float()
        pixels = torch.cat([codec.decode(one[None], None, height, width) for one in latents])
        per_row = [count * codec.stride[0] for count in sharding.latent_frames_per_row(latent_frames)]
        return all_gather(pixels, sharding.column_group, 2, per_row)[:, :, :num_frames].float()

    def decoding_plan(
        self, videos: int, latent_shape: Sequence[int], num_frames: int, height: int, width: int
    ) -> TilePlan:
        """Return the tiles in which the ranks decode each of the videos of a batch; all of them must ask.

        Args:
            latent_shape: T', H', W' of the latents.

        Raises:
            UserError: if there is not enough memory for a tile.
        """
        others = (videos - 1) * 3 * 4 * num_frames * height * width  # bytes of the decoded ones
        ranks = Ranks(self.mesh.sp, self.mesh.cfg)
        return self.codec.tile_plan(latent_shape, num_frames, height, width, ranks=ranks, reserved=others)


def _per_sample(levels: Tensor) -> Tensor:
    """Return noise levels ``[B T]`` as ``[B 1]`` where all frames share one, which is cheaper for the model."""
    return levels[:, :1] if (levels == levels[:, :1]).all() else levels


diffusers.pipelines.STDiTPipeline = STDiTPipeline  # where diffusers looks for the source of a pipeline
