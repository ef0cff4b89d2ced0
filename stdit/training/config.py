"""All settings of a training run, and the rules that connect them. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from stdit.codecs.config import CODECS, CodecConfig, TextEncoderConfig
from stdit.data.config import DataConfig
from stdit.diffusion.config import FlowConfig
from stdit.errors import UserError
from stdit.lora.config import BaseDtype, LoRAConfig, parse_lora
from stdit.models.config import STDiTConfig
from stdit.parallel.config import TrainingParallelConfig
from stdit.pipelines.config import PIPELINE_DEFAULTS, VideoSettings, check_seed
from stdit.registry import Registry
from stdit.settings import parse
from stdit.training.memory_config import MemoryConfig, check_memory

OPTIMIZERS: Registry[Any] = Registry(
    "optimizer.name", {"adamw": "stdit.training.optim:build_adamw", "muon": "stdit.training.optim:build_muon"}
)
"""Name to function ``(model, config) -> optimizer``: see `stdit.training.optim.register_optimizer`."""
NEIGHBOUR_FRACTION = 4
"""The spike guard compares a loss with 1/4 of the earlier ones: those with the nearest noise levels."""


@dataclass
class SpikeConfig:
    """When a loss is a spike, and what to do about it."""

    factor: float | None = None
    """A loss above this many times the median of earlier ones at similar noise levels is a spike; none: no guard."""
    window: int = 200
    """Number of earlier steps to compare with; there are no spikes before this many steps."""
    exclude_batches: int = 1
    """Batches that a spike excludes from the run: its own and those before it. With more than 1 the run rolls back to
    a checkpoint before them; with 1 the update is not applied, which has the same effect."""
    max_spikes: int = 10
    """Stop the run at this many spikes."""

    def __post_init__(self) -> None:
        if self.factor is not None and not 1 < self.factor < math.inf:
            raise UserError(f"trainer.spike.factor = {self.factor}: must be above 1")
        for name, least in (("window", 2 * NEIGHBOUR_FRACTION), ("exclude_batches", 1), ("max_spikes", 1)):
            if getattr(self, name) < least:
                raise UserError(f"trainer.spike.{name} = {getattr(self, name)}: must be at least {least}")


@dataclass
class TrainerConfig:
    """Number of steps, arithmetic and device."""

    steps: int = 10000
    """Steps of the whole run; a resumed run trains up to this step."""
    micro_batch_size: int | None = None
    """Clips of a micro-batch of a process, over which gradients accumulate. None: its whole share of the batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the model; the loss stays in float32, and so do weights and optimizer, but for memory.* and
    lora.base_dtype."""
    matmul_precision: Literal["highest", "fastest_exact", "fastest", "high", "medium"] = "highest"
    """Precision of float32 matrix products in the model, as in torch.set_float32_matmul_precision: high and medium
    use TF32 on GPUs; medium uses bfloat16 on CPUs with AMX, and on others a way that may be faster and is exact.
    fastest_exact: the first step takes medium where it rounds to float32 and is measured to be at least 5% faster,
    else highest; the run keeps to that. fastest: likewise, but medium may round to TF32 or bfloat16."""
    max_grad_norm: float = 1.0
    """Scale gradients with a larger norm down to this; .inf for no clipping."""
    max_nonfinite_steps: int = 10
    """Skip steps without a finite loss and gradient; stop the run after this many in a row."""
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    """Guard against losses that jump."""
    block_norms_every: int | None = None
    """Steps between lines of metrics.jsonl with norms of weights, gradients and updates of each block; such a step
    keeps a copy of the weights in memory."""
    compile: bool = False
    """Compile the blocks with torch.compile: slow to start, and worth it on GPUs, and for long runs on CPUs, where it
    needs a C++ compiler."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU if there is one."""
    num_threads: int | None = None
    """CPU threads; none: PyTorch's default."""
    keep_freed_memory: bool = True
    """On CPUs, keep freed memory for the next step rather than return it to the system: faster."""

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batch_size", "max_nonfinite_steps", "block_norms_every", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"trainer.{name} = {value}: must be at least 1")
        if not self.max_grad_norm > 0:
            raise UserError(f"trainer.max_grad_norm = {self.max_grad_norm}: must be positive; .inf for none")

    def is_due(self, step: int, every: int) -> bool:
        """Return whether what is done every ``every`` steps, and at the end, is due after ``step`` steps."""
        return step % every == 0 or step == self.steps


@dataclass
class OptimizerConfig:
    """Optimizer and learning rate schedule."""

    name: str = field(default="adamw", metadata={"choices": OPTIMIZERS})
    """muon: Muon for the matrices of attention and MLP, AdamW for everything else."""
    lr: float = 1e-4
    """Learning rate of AdamW after warm-up."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW: decay of the running mean and of the running square."""
    eps: float = 1e-8
    """AdamW: added to the root of the running square."""
    weight_decay: float = 0.0
    """Decoupled weight decay of all matrices, times the learning rate."""
    muon_lr: float = 5e-3
    """Learning rate of Muon after warm-up."""
    muon_momentum: float = 0.95
    """Muon: momentum (Nesterov's)."""
    muon_scale: Literal["original", "match_rms_adamw"] = "original"
    """Muon: step sizes as Jordan's, sqrt(rows / columns), or as large as AdamW's, 0.2 sqrt(larger side)."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of the decay of the learning rates at the end."""
    warmup_steps: int = 0
    """Steps over which the learning rates rise from 0."""
    decay_share: float = 1.0
    """cosine, linear: share of all steps, at the end, over which the rates decay."""
    final_share: float = 0.0
    """cosine, linear: share of the rates that is left at the end."""

    def __post_init__(self) -> None:
        OPTIMIZERS.check(self.name)
        for name in ("lr", "muon_lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"optimizer.{name} = {getattr(self, name)}: must be positive")
        for name, value in (("muon_momentum", self.muon_momentum), *(("betas", beta) for beta in self.betas)):
            if not 0 <= value < 1:
                raise UserError(f"optimizer.{name} = {value}: must be at least 0 and below 1")
        for name in ("weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"optimizer.{name} = {getattr(self, name)}: must not be negative")
        for name in ("decay_share", "final_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"optimizer.{name} = {getattr(self, name)}: must lie between 0 and 1")


@dataclass
class EMAConfig:
    """Exponential moving average of the weights."""

    decay: float = 0.999
    """Share of the average that each step keeps; 0: none, which saves its memory; the latest weights are used."""
    warmup: bool = True
    """Keep less in early steps: min(decay, (1 + step) / (10 + step))."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"ema.decay = {self.decay}: must be at least 0 and below 1")


@dataclass
class CheckpointConfig:
    """When to save a checkpoint, and how long to keep it."""

    every: int = 1000
    """Steps between checkpoints; the last step saves one, too."""
    minutes: float | None = None
    """Also save a checkpoint when this many minutes have passed since the last one."""
    asynchronous: bool = True
    """Continue to train while a checkpoint is written; needs CPU memory for a copy of what the process writes."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int | None = None
    """Also save checkpoints at multiples of this step, and keep them."""
    keep_best: int = 0
    """Also keep this many checkpoints with the lowest validation loss."""

    def __post_init__(self) -> None:
        for name in ("every", "keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"checkpoint.{name} = {value}: must be at least 1")
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"checkpoint.minutes = {self.minutes}: must be positive")
        if self.keep_best < 0:
            raise UserError(f"checkpoint.keep_best = {self.keep_best}: must not be negative")


@dataclass
class ValidationConfig(VideoSettings):
    """Validation videos and validation loss. The video settings also become those of the exported pipeline.

    None for num_frames, height, width and fps: that of the bucket with the most clips.
    """

    prompts: list[str] = field(default_factory=list)
    """Prompts of the videos in samples/ in the run folder, one each; none: no validation videos."""
    captions: int = 0
    """Also take this many captions of the training clips, spread over them, as prompts."""
    every: int = 1000
    """Steps between validations; the last step has one, too."""
    seed: int = 0
    """Seed of every video."""
    compare_base: bool = True
    """With lora.rank: also make each video without the adapter, once, and show it beside that with it."""
    loss_every: int | None = None
    """Steps between measurements of the validation loss: at fixed noise levels, with fixed noise, of fixed clips."""
    loss_manifest: str | None = None
    """Manifest of held-out clips for the validation loss; none: the first of the training clips."""
    loss_clips: int = 16
    """Most clips of each bucket in the validation loss."""
    loss_levels: int = 4
    """Noise levels of each clip in the validation loss: quantiles of the levels in training."""
    patience: int | None = None
    """End the run when this many measurements of the validation loss in a row were not better than the best before
    them, whose checkpoint is saved and kept."""
    min_improvement: float = 0.0
    """Share of the best validation loss by which another must be lower to be better, for patience."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"validation.every = {self.every}: must be at least 1; for none, give no prompts")
        if any(not prompt.strip() for prompt in self.prompts):
            raise UserError("validation.prompts has an empty prompt: write it, or delete it")
        if self.captions < 0:
            raise UserError(f"validation.captions = {self.captions}: must be at least 0, none")
        for name in ("loss_every", "loss_clips", "loss_levels", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"validation.{name} = {value}: must be at least 1")
        if self.patience is not None and self.loss_every is None:
            raise UserError(
                f"validation.patience = {self.patience}: it waits for the validation loss, which is not measured: "
                "set validation.loss_every, such as 100, and validation.loss_manifest, clips that are not trained on"
            )
        if not 0 <= self.min_improvement < 1:
            raise UserError(
                f"validation.min_improvement = {self.min_improvement}: must be at least 0 and below 1, such as 0.01"
            )
        check_seed(self.seed, "validation.")
        self.check("validation.")


@dataclass
class TrackerConfig:
    """Tracker to use beside ``metrics.jsonl``."""

    name: Literal["none", "tensorboard", "wandb"] = "none"
    """tensorboard writes to the run folder; wandb sends to wandb.ai, or writes to the run folder when offline."""
    project: str = "stdit"
    """wandb: project of the run."""
    mode: Literal["online", "offline"] = "online"
    """wandb: offline writes to the run folder, for `wandb sync`; so does online without key or network."""
    every: int = 10
    """Steps between measurements sent to the tracker; metrics.jsonl has them all."""
    timeout: float = 60.0
    """wandb: seconds to wait for a connection before going offline, and to send what is left at the end."""

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("timeout", 0.1)):
            if not getattr(self, name) >= least:
                raise UserError(f"tracker.{name} = {getattr(self, name)}: must be at least {least}")


@dataclass
class LoRATrainingConfig(LoRAConfig):
    """The adapter that is trained, and what it begins with."""

    base_dtype: BaseDtype = "fp32"
    """How the weights of init_from are kept, which are not trained: in bf16 or, of the linear layers in all blocks
    but the last, rounded to 8 or 4 bits (nf4: normal floats, QLoRA). These need precision bf16, 8 and 4 bits also
    torchao."""
    init_from: str | None = None
    """Adapter to begin with, of the same rank and targets: a file, or a folder with one."""
    merge: list[str] = field(default_factory=list)
    """Adapters to merge into the weights of init_from first, FILE[:weight], repeatable: to train on top of them."""
    other_base: bool = False
    """Also begin with, or merge, adapters that were trained on other weights than init_from."""


MOST_STEPS = 64
"""Of a few-step student, which takes them all in a training step."""


@dataclass
class DistillConfig:
    """A student that learns to do in fewer model calls what the model of init_from does: its teacher."""

    guidance_scale: tuple[float, float] | None = None
    """Guidance scales of the teacher, drawn evenly from this range, that the student takes as an input and follows in
    one call instead of two. None: no distillation."""
    steps: list[int] = field(default_factory=list)
    """Numbers of steps in which the student learns to make a video, such as [1, 2, 4]; the largest becomes the
    pipeline's own. []: as many as the teacher needs."""
    score_updates: int = 2
    """With steps: updates, in each training step, of the score, a model of the student's videos."""
    score_lr: float = 2.0
    """With steps: learning rates of the score, as multiples of the student's."""

    def __post_init__(self) -> None:
        scales = self.guidance_scale
        if scales is not None and not (len(scales) == 2 and 0 <= scales[0] < scales[1] < math.inf):
            raise UserError(
                f"distill.guidance_scale = {list(scales)}: must be two rising guidance scales, such as [1, 5]"
            )
        if not all(1 <= count <= MOST_STEPS for count in self.steps) or self.steps != sorted(set(self.steps)):
            raise UserError(
                f"distill.steps = {self.steps}: must be rising numbers of steps from 1 to {MOST_STEPS}, such as "
                "[1, 2, 4]"
            )
        if self.steps and scales is None:
            raise UserError(
                f"distill.steps = {self.steps}: the student's teacher needs guidance scales: add "
                "distill.guidance_scale, such as [1, 4], around the one that you sample with"
            )
        if self.score_updates < 1:
            raise UserError(f"distill.score_updates = {self.score_updates}: must be at least 1")
        if not 0 < self.score_lr < math.inf:
            raise UserError(f"distill.score_lr = {self.score_lr}: must be above 0, such as 2")


FEW_STEP_SAMPLING: dict[str, Any] = {
    "num_inference_steps": None,
    "solver": "euler",
    "shift": None,
    "cache": "off",
    "pab": [],
}
"""Settings of validation videos that follow from ``distill.steps``, each with the value that is allowed, too."""


@dataclass
class TrainConfig:
    """A training run."""

    name: str = "run"
    """The run folder is output_dir/name."""
    output_dir: str = "outputs"
    """Folder of all runs."""
    seed: int = 0
    """Seed of everything random: initial weights, order of clips, noise."""
    resume: str = "auto"
    """auto: resume from the newest complete checkpoint of the run; never: refuse to; or the path of a checkpoint."""
    resume_changed: bool = False
    """Resume although clips or settings have changed, with the weights, optimizer state and average of the
    checkpoint; the changes are recorded. Another model, codec or text encoder still needs a new run (init_from)."""
    init_from: str | None = None
    """Start from the weights of another run, checkpoint, pipeline or model folder, with a new optimizer."""
    imports: list[str] = field(default_factory=list)
    """Module of your own to import, with its register_... calls (stdit.codecs.register_codec and others); may be
    repeated."""
    fit: float | None = None
    """GiB that each process may use: choose the settings of memory and lora.base_dtype that are fastest and fit, as
    estimated; those that are not their defaults stay."""
    dry_run: bool | Literal["steps", "sp", "memory"] = False
    """true: print what the run would train on and the memory it needs, write NAME.clips.csv (which clip goes to which
    bucket, and why) beside the run folder, and stop. steps: also do a few steps, and tell the time of all. sp: also
    compare values of parallel.sp; memory: also compare settings that save memory."""
    model: STDiTConfig = field(default_factory=STDiTConfig)
    """The transformer."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    """From pixels to latents."""
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """From captions to text states."""
    lora: LoRATrainingConfig = field(default_factory=LoRATrainingConfig)
    """An adapter that is trained instead of the weights of init_from; the model's settings are then those of that."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Distillation of the model of init_from; the model's settings are then those of that."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """The objective."""
    data: DataConfig = field(default_factory=DataConfig)
    """The clips."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Number of steps, arithmetic and device."""
    parallel: TrainingParallelConfig = field(default_factory=TrainingParallelConfig)
    """Several processes."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """What is kept, and where, to save memory."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rate schedule."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    """Averaged weights."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save, and what to keep."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Validation videos and validation loss."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """Where measurements go."""

    @property
    def run_folder(self) -> Path:
        """The folder that the run writes to."""
        return Path(self.output_dir) / self.name

    @property
    def memory_gib(self) -> float | None:
        """GiB that each process may use; None: what there is."""
        return self.parallel.memory_gib if self.fit is None else self.fit

    @property
    def has_teacher(self) -> bool:
        """Whether the model of init_from teaches a student."""
        return self.distill.guidance_scale is not None

    def validate(self) -> None:
        """Raise UserError for settings that do not go together."""
        parts = PurePosixPath(self.name).parts
        if not parts or ".." in parts or self.name.startswith("/"):
            raise UserError(f"name = {self.name!r}: must be a folder name, such as my-run")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed = {self.seed}: must be from 0 to 2^63 - 1")
        if self.lora.rank is not None and self.init_from is None:
            raise UserError(
                f"lora.rank = {self.lora.rank}: an adapter needs the model that it is for: add init_from, a run, a "
                "checkpoint, or a pipeline or model folder."
            )
        if self.lora.rank is not None and self.optimizer.name == "muon":
            raise UserError(
                "optimizer.name = muon: is for the matrices of a whole model, and would leave all of an adapter's to "
                "AdamW: set --optimizer.name adamw."
            )
        if self.has_teacher and self.init_from is None:
            raise UserError(
                "distill.guidance_scale: a student needs a teacher: add init_from, a run, a checkpoint, or a "
                "pipeline or model folder."
            )
        if self.has_teacher and self.lora.rank is not None:
            raise UserError(
                f"distill.guidance_scale and lora.rank = {self.lora.rank}: a student has a new input, which an "
                "adapter cannot learn: leave one of them out."
            )
        if self.model.guidance_range is not None and not self.has_teacher:
            raise UserError(
                f"model.guidance_range = {list(self.model.guidance_range)}: only a teacher shows what a guidance "
                "scale does: set distill.guidance_scale instead, and init_from."
            )
        if self.distill.steps and self.validation.loss_every is not None:
            raise UserError(
                f"validation.loss_every = {self.validation.loss_every} and distill.steps = {self.distill.steps}: a "
                "few-step student has no loss on clips, since it learns from its own videos: leave loss_every out, "
                "and judge validation videos."
            )
        for name, usual in FEW_STEP_SAMPLING.items() if self.distill.steps else ():
            if (value := getattr(self.validation, name)) not in (None, usual):
                raise UserError(
                    f"validation.{name} = {value} and distill.steps = {self.distill.steps}: a few-step student makes "
                    f"videos in these steps, as in its training: leave validation.{name} out."
                )
        resolved = self.validation.resolved(PIPELINE_DEFAULTS)
        self.validation.check_saving(resolved, "validation.")
        self.validation.check_guidance(resolved, self.distill.guidance_scale, where="validation.")
        check_memory(self)
        if self.fit is not None and not 0 < self.fit < math.inf:
            raise UserError(f"fit = {self.fit}: must be a number of GiB above 0, such as 24")
        for text in self.lora.merge:
            parse_lora(text)
        self.data.validate()
        built_in = CODECS.module(self.codec.name) is None  # a user's codec may know the variance, too
        if self.flow.prediction == "residual" and built_in and self.codec.name not in ("pca", "tiny"):
            raise UserError(
                f"flow.prediction = residual and codec.name = {self.codec.name}: residual needs a codec that "
                "knows the variance of its latents: use codec.name = pca or tiny, or flow.prediction = velocity"
            )
        if self.flow.conditioning and self.model.patch_size[0] > 1:
            raise UserError(
                f"flow.conditioning and model.patch_size = {list(self.model.patch_size)}: conditioning frames need "
                "patches that are one frame long: remove flow.conditioning, or use a patch_size of [1, ...]"
            )


def parse_train(argv: Sequence[str] | None = None, doc: str | None = None) -> TrainConfig:
    """Parse and check the settings of a training, as `parse` does. Raises UserError."""
    config = parse(TrainConfig, argv, doc)
    config.validate()
    return config
