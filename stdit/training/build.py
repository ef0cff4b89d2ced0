"""Build the components of a run from its settings: batch plan, codec, text encoder, objective, model."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch

from stdit.checkpoint_files import read_json, read_meta
from stdit.codecs import build_codec, build_text_encoder
from stdit.codecs.base import VideoCodec
from stdit.codecs.config import CodecConfig
from stdit.codecs.text import TextEncoder
from stdit.data.buckets import Bucket
from stdit.data.build import build_plan
from stdit.data.cache.codec_fitting import fit_codec
from stdit.data.cache.keys import remembered
from stdit.data.clip_list import ClipList
from stdit.data.manifest.archives import is_archive
from stdit.data.plan import BatchPlan
from stdit.diffusion.flow import FlowObjective
from stdit.errors import UserError
from stdit.lora.adapters import add_adapter, check_targets
from stdit.lora.config import find_initial_adapter, parse_lora
from stdit.lora.files import begin_with, check_fits, check_kind
from stdit.models.config import STDiTConfig, token_grid
from stdit.models.size import meta_model
from stdit.models.stdit import STDiT
from stdit.parallel.processes.mesh import runs_on_cpu
from stdit.parallel.sequence.planner import format_gib
from stdit.pipelines.sources import MODEL_INDEX, find_initial_weights, is_checkpoint, pipeline_step
from stdit.pipelines.untrained import warn_of_missing_trigger
from stdit.pipelines.weights import FrozenModel, open_initial_weights, read_base
from stdit.training.config import TrainConfig, ValidationConfig
from stdit.training.distillation import GuidanceTeacher
from stdit.training.experiment import experiment_key
from stdit.training.lineage import CLIPS, Resumed, lineage, resume
from stdit.training.unused import unused_settings
from stdit.training.weight_memory import WeightCounts

logger = logging.getLogger(__name__)


@dataclass
class RunInputs:
    """Components of a run without the model."""

    config: TrainConfig
    """The settings, with the sizes that the model takes from codec and text encoder."""
    plan: BatchPlan
    codec: VideoCodec
    text_encoder: TextEncoder
    flow: FlowObjective
    resumed: Resumed | None
    """The checkpoint that the run resumes from, and what has changed since; None: the run starts at step 0."""


@dataclass
class RunComponents(RunInputs):
    """Components of a run."""

    model: STDiT
    base: FrozenModel | None = None
    """The weights that an adapter is trained on."""
    teacher: GuidanceTeacher | None = None
    """What the model learns from instead of the data's velocity."""
    score: STDiT | None = None
    """The model of the videos of a few-step student, which is trained beside it."""

    def to(self, device: torch.device) -> None:
        """Move codec, text encoder and teacher to a device; the trainer moves the model."""
        self.codec.to(device)
        self.text_encoder.to(device)
        if self.teacher is not None:
            self.teacher.model.to(device)

    @cached_property
    def experiment(self) -> dict[str, Any]:
        """Settings, and hashes of the clips and of the frozen networks: what makes two runs the same experiment."""
        return {
            **experiment_key(self.config),
            CLIPS: clips_hash(self.plan),
            "codec's weights": self.codec.fingerprint(),
            "text encoder's weights": self.text_encoder.fingerprint(),
            **({} if self.base is None else {"base's weights": self.base.hash}),
            **({} if self.teacher is None else {"teacher's weights": self.teacher.source.hash}),
        }

    @cached_property
    def lineage(self) -> list[dict[str, Any]]:
        """The changes of the run, at this start and before: see `stdit.training.lineage.lineage`."""
        return lineage(self.resumed, self.experiment)

    @cached_property
    def clip_list(self) -> bytes:
        """Content of the list of clips that checkpoints keep."""
        return ClipList.of(self.plan.assignment).to_bytes()


def build_components(
    config: TrainConfig,
    checkpoint: Path | None,
    processes: int,
    memory: int,
    fit: Callable[[RunInputs], RunInputs] = lambda inputs: inputs,
) -> RunComponents:
    """Build all components of a run on the CPU.

    Args:
        checkpoint: the checkpoint to resume from; its run may have saved the codec. None: start at step 0, with
            the weights of ``init_from`` if that is set.
        processes: number of processes that train together.
        memory: bytes that each of them may use.
        fit: chooses settings of ``memory`` and ``lora`` before the model is built.

    Raises:
        UserError: for data, weights or settings that cannot be used, or a model that does not fit in memory.
    """
    inputs = fit(build_inputs(config, checkpoint))
    if config.lora.rank is not None:
        _check_base_fits(inputs.config, processes, memory)
        model, base = build_adapted_model(inputs.config, inputs.resumed)
        return RunComponents(**vars(inputs), model=model, base=base)
    _check_model_fits(inputs.config, processes, memory)
    model = build_model(inputs.config)
    if inputs.config.has_teacher:
        teacher = build_teacher(inputs)
        score = build_model(inputs.config) if inputs.config.distill.steps else None
        for student in filter(None, [model, score]) if checkpoint is None else ():
            # All but the embedding of guidance.
            student.load_state_dict(teacher.model.state_dict(), strict=False)
        return RunComponents(**vars(inputs), model=model, teacher=teacher, score=score)
    if checkpoint is None and config.init_from is not None:
        open_initial_weights(config.init_from).copy_to(model)
    return RunComponents(**vars(inputs), model=model)


def build_inputs(config: TrainConfig, checkpoint: Path | None = None, dry_run: bool = False) -> RunInputs:
    """Build all components but the model; ``dry_run`` does not fit the codec. Raises as `build_components` does."""
    for line in unused_settings(config):
        logger.warning(line)
    if config.validation.loss_every is not None and (manifest := config.validation.loss_manifest) is not None:
        if not is_archive(manifest) and not Path(manifest).exists():
            raise UserError(
                f"validation.loss_manifest = {manifest}: there is no such file or folder: correct it."
            )
    if config.lora.rank is not None:
        config = replace(config, model=base_settings(config), codec=base_codec(config))
        check_targets(base := meta_model(config.model), config.lora)
        for text in config.lora.merge:
            check_fits(parse_lora(text).file, base)
        first = None if checkpoint is not None else config.lora.init_from
        if first is not None and Path(first).exists():  # it need not be there to resume
            add_adapter(base, config.lora)
            check_kind(base, find_initial_adapter(first))
    if config.has_teacher:
        config = replace(config, model=student_settings(config), codec=base_codec(config))
    index = None if dry_run else config.run_folder / "clips"
    plan = build_plan(config.data, config.seed, index, remembered(config.data))
    resumed = None
    if checkpoint is not None:  # before the codec and the text encoder load, which may take long
        resumed = compare_with_checkpoint(checkpoint, config, plan)
    if checkpoint is not None and (saved := checkpoint.parent.parent / "codec").is_dir():
        codec = VideoCodec.from_pretrained(saved)
    else:
        codec = build_codec(config.codec)
    variance = codec.latent_variance
    if not getattr(codec, "fitted", True):
        if dry_run:
            variance = torch.ones(codec.channels)
        else:
            codec = fit_codec(codec, plan, config.data)
            variance = codec.latent_variance
    codec.enable_tiling(config.codec.tile)  # also one that was saved, without it
    text_encoder = build_text_encoder(config.text_encoder)
    texts = plan.assignment.clips.texts
    captions = (texts[index] for members in plan.assignment.members for index in members.tolist())
    config = replace(config, validation=_with_captions(config.validation, plan))
    text_encoder.check(chain(captions, config.validation.prompts))
    warn_of_missing_trigger(config.validation.prompts, config.data.trigger, "data.trigger")
    plan = plan.sized(lambda bucket: _tokens_per_clip(config, codec, bucket))
    flow = FlowObjective(config.flow, variance)
    resolved = resolved_config(config, codec, text_encoder)
    if config.lora.rank is not None or config.has_teacher:
        _check_trained_with(config, codec, text_encoder)
    return RunInputs(resolved, plan, codec, text_encoder, flow, resumed)


def _with_captions(validation: ValidationConfig, plan: BatchPlan) -> ValidationConfig:
    """Return settings whose prompts hold the captions that ``validation.captions`` asks for."""
    if not validation.captions:
        return validation
    clips = sorted({int(index) for members in plan.assignment.members for index in members})
    count = min(validation.captions, len(clips))
    texts = [plan.assignment.clips.texts[clips[place * len(clips) // count]] for place in range(count)]
    return replace(validation, prompts=list(dict.fromkeys([*validation.prompts, *filter(str.strip, texts)])))


def compare_with_checkpoint(checkpoint: Path, config: TrainConfig, plan: BatchPlan) -> Resumed:
    """Compare settings and clips with those of the checkpoint to resume from. Raises as `lineage.resume` does."""
    experiment = {**experiment_key(config), CLIPS: clips_hash(plan)}
    return resume(checkpoint, experiment, ClipList.of(plan.assignment), config.resume_changed)


def _tokens_per_clip(config: TrainConfig, codec: VideoCodec, bucket: Bucket) -> int:
    """Return the number of tokens of a clip of a bucket."""
    latents = codec.latent_shape(bucket.num_frames, bucket.height, bucket.width)
    return prod(token_grid(latents, config.model.patch_size))


def _check_model_fits(config: TrainConfig, processes: int, memory: int) -> None:
    """Raise UserError if the training state of the model alone exceeds the memory of a process."""
    counts = WeightCounts.of(config)
    state = sum(counts.bytes(config, processes, not runs_on_cpu(config.trainer.device)).values())
    if state > memory:
        raise UserError(
            f"model.depth = {config.model.depth} and model.hidden_size = {config.model.hidden_size} make "
            f"{counts.weights:,} parameters, of which a process holds {format_gib(state)} GiB (weights, gradients, "
            f"optimizer, average), but it has {format_gib(memory)} GiB: lower them, divide it among processes "
            "(parallel.shard_parameters), or set parallel.memory_gib if it has more"
        )


def _check_base_fits(config: TrainConfig, processes: int, memory: int) -> None:
    """Raise UserError if the weights of an adapter's base alone exceed the memory of a process."""
    counts = WeightCounts.of(config)
    size = counts.bytes(config, processes, not runs_on_cpu(config.trainer.device))["frozen weights"]
    if size > memory:
        raise UserError(
            f"the model in init_from = {config.init_from} has {counts.frozen:,} parameters, of which a process holds "
            f"{format_gib(size)} GiB, but it has {format_gib(memory)} GiB: use a smaller one, keep it in fewer bits "
            "(lora.base_dtype), divide it among processes (parallel.shard_parameters), or set parallel.memory_gib "
            "if it has more"
        )


def resolved_config(config: TrainConfig, codec: VideoCodec, text_encoder: TextEncoder) -> TrainConfig:
    """Return the settings with the sizes that the model takes from codec and text encoder; those of a base stay.

    Without ``resume_changed``: to allow changes counts for one start, also if its config.yaml is used again.
    """
    model = replace(
        config.model,
        in_channels=codec.channels,
        caption_channels=text_encoder.channels,
        model_max_length=text_encoder.max_length,
    )
    if config.lora.rank is not None or config.has_teacher:
        _check_base_takes(config.model, model)
        return replace(config, resume_changed=False)
    for name in ("in_channels", "caption_channels", "model_max_length"):
        asked, used = getattr(config.model, name), getattr(model, name)
        if asked not in (used, getattr(STDiTConfig, name)):
            logger.warning(f"model.{name} = {asked} has no effect: codec and text encoder make it {used}")
    return replace(config, model=model, resume_changed=False)


def build_model(config: TrainConfig) -> STDiT:
    """Return a new model, a function of the seed; torch's global random state does not change.

    Args:
        config: as `resolved_config` returns it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = STDiT(**asdict(config.model))
    model.set_activations(config.memory.block_activations(len(model.blocks)))
    return model


def base_settings(config: TrainConfig) -> STDiTConfig:
    """Return the model's settings in ``init_from``; check that the objective is that of its training.

    Raises:
        UserError: if there is no such model, its output means something else than ``flow.prediction`` says, or it is
            a student, which takes the guidance scale as an input.
    """
    assert config.init_from is not None
    folder = find_initial_weights(config.init_from)
    of_run = is_checkpoint(folder)
    recorded = read_json((folder / "model" if of_run else folder) / "config.json", "a model")
    if of_run:
        flow = read_meta(folder).get("config", {}).get("flow", {})
    else:
        index = folder.parent / "model_index.json"
        flow = (read_json(index, "a pipeline").get("flow") or {}) if index.is_file() else {}
    if (trained := flow.get("prediction", config.flow.prediction)) != config.flow.prediction:
        raise UserError(
            f"flow.prediction = {config.flow.prediction}: {config.init_from} was trained with {trained}, and that "
            f"stays: set --flow.prediction {trained}."
        )
    found = STDiTConfig.read(recorded)
    if found.guidance_range is not None:
        raise UserError(
            f"init_from = {config.init_from}: takes the guidance scale as an input, which training does not give it: "
            "begin with the model that it learned from."
        )
    return found


def student_settings(config: TrainConfig) -> STDiTConfig:
    """Return the settings of a student: those of its teacher, and the guidance scales that it takes.

    Raises:
        UserError: as `base_settings`; or ``model.*`` asks for another architecture.
    """
    teacher = base_settings(config)
    default = STDiTConfig()
    for name, asked in asdict(config.model).items():
        if asked not in (getattr(default, name), getattr(teacher, name)) and name != "guidance_range":
            raise UserError(
                f"model.{name} = {asked}: the teacher in init_from = {config.init_from} has "
                f"{getattr(teacher, name)}, and a student has its architecture: leave model.* out."
            )
    return replace(teacher, guidance_range=config.distill.guidance_scale)


def build_teacher(inputs: RunInputs) -> GuidanceTeacher:
    """Return the model that a student learns from; when a run resumes, the one that its checkpoint records."""
    config, scales = inputs.config, inputs.config.distill.guidance_scale
    assert scales is not None
    model, found = read_base(_frozen_source(config, inputs.resumed, "teacher"), [])
    return GuidanceTeacher(model, scales, found)


def _frozen_source(config: TrainConfig, resumed: Resumed | None, key: str) -> str:
    """Return where the weights of ``init_from`` are that are not trained.

    If ``init_from`` has not changed since the checkpoint that the run resumes from, they are those that it records
    under ``key``: a run in ``init_from`` may have newer weights now.
    """
    assert config.init_from is not None
    if resumed is None or resumed.meta.get("config", {}).get("init_from") != config.init_from:
        return config.init_from
    recorded: str = resumed.meta[key]["path"]
    return recorded if Path(recorded).exists() else config.init_from


def base_codec(config: TrainConfig) -> CodecConfig:
    """Return the settings of the codec, with the copy in the run of ``init_from`` unless they name another folder.

    One that is fitted to data would be fitted to other clips than the model knows.
    """
    assert config.init_from is not None
    run = find_initial_weights(config.init_from).absolute().parents[1]
    saved = run / "codec"
    if config.codec.path is None and saved.is_dir() and (run / "config.yaml").is_file():
        return replace(config.codec, path=str(saved))
    return config.codec


def _check_base_takes(base: STDiTConfig, needed: STDiTConfig) -> None:
    """Raise UserError unless the base of an adapter takes what codec and text encoder give."""
    for name, what in (
        ("in_channels", "codec gives latents of"),
        ("caption_channels", "text encoder gives states of"),
    ):
        if (found := getattr(needed, name)) != (takes := getattr(base, name)):
            raise UserError(
                f"the {what} {found} channels, but the model in init_from takes {takes}: use the codec.* and "
                "text_encoder.* settings of its training."
            )
    if needed.model_max_length > base.model_max_length:
        raise UserError(
            f"text_encoder.max_length = {needed.model_max_length}: the model in init_from reads at most "
            f"{base.model_max_length} tokens: set that."
        )


def _check_trained_with(config: TrainConfig, codec: VideoCodec, text_encoder: TextEncoder) -> None:
    """Raise UserError if the base of an adapter is of a run with another codec or text encoder."""
    assert config.init_from is not None
    folder = find_initial_weights(config.init_from)
    if not is_checkpoint(folder):  # the pipeline of a run has its last checkpoint beside it
        step = pipeline_step(folder.parent) if (folder.parent / MODEL_INDEX).is_file() else None
        folder = folder.parents[1] / "checkpoints" / f"step-{step or 0:08d}"
    if not is_checkpoint(folder):
        return
    trained = read_meta(folder).get("experiment", {})
    for group, component in (("codec", codec), ("text encoder", text_encoder)):
        known = trained.get(f"{group}'s weights")
        if known is not None and known != component.fingerprint():
            raise UserError(
                f"the model in init_from = {config.init_from} was trained with another {group}, or other settings of "
                f"it: use the {group.replace(' ', '_')}.* settings of its training."
            )


def build_adapted_model(config: TrainConfig, resumed: Resumed | None) -> tuple[STDiT, FrozenModel]:
    """Return the model of ``init_from`` with a new adapter, which alone is trained, and what the base is.

    Args:
        resumed: the checkpoint that the run resumes from.

    Raises:
        UserError: if the base or an adapter cannot be read, or they do not fit.
    """
    source = _frozen_source(config, resumed, "base")
    model, base = read_base(source, config.lora.merge, config.lora.other_base, config.lora.base_dtype)
    add_adapter(model, config.lora, config.seed)
    if resumed is None and config.lora.init_from is not None:
        file = find_initial_adapter(config.lora.init_from)
        begin_with(model, file, None if config.lora.other_base else base.hash)
    model.set_activations(config.memory.block_activations(len(model.blocks)))
    return model, base


def clips_hash(plan: BatchPlan) -> str:
    """Return a hash of which clips train in which bucket: names inside the data root, captions, lengths, sizes."""
    digest = hashlib.sha256()
    for bucket, members in zip(plan.assignment.buckets, plan.assignment.members, strict=True):
        digest.update(f"{bucket}\n".encode())
        for part in plan.assignment.clips.content(members):
            digest.update(part)
    return digest.hexdigest()[:16]
