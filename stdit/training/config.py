"""All settings of a training run, and the rules that tie them together. Imports nothing heavy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stdit.cli import parse, plain
from stdit.codecs.config import CodecConfig, TextEncoderConfig
from stdit.data.config import DataConfig
from stdit.diffusion.config import FlowConfig
from stdit.errors import UserError
from stdit.models.config import STDiTConfig
from stdit.parallel.config import TrainingParallelConfig
from stdit.training.checkpoint import CheckpointConfig
from stdit.training.ema import EMAConfig
from stdit.training.optim import OptimizerConfig
from stdit.training.tracking import TrackerConfig
from stdit.training.trainer import TrainerConfig
from stdit.training.validation import ValidationConfig

EXPERIMENT = ("seed", "model", "codec", "text_encoder", "flow", "data", "optimizer", "ema")
# What may change between two parts of a run. Paths may move: what lies there is known by its hash. The sizes
# that the model takes from codec and text encoder follow from these.
FREE = {
    "codec.path",
    "codec.subfolder",
    "text_encoder.path",
    "text_encoder.subfolder",
    "data.manifest",
    "data.root",
    "data.cache_dir",
    "data.sources",
    "data.workers",
    "data.max_skipped_share",
    "model.in_channels",
    "model.caption_channels",
    "model.model_max_length",
}

DESCRIPTION = """Train a text-to-video ST-DiT on a CPU or a GPU.
The same command again resumes an interrupted run."""
EXAMPLES = """examples:
  python train.py --config configs/train/quickstart.yaml
  python train.py --config configs/train/finetune.yaml --data.manifest clips/manifest.csv --name clips
  python train.py --config configs/train/quickstart.yaml --dry_run true
"""


@dataclass
class TrainConfig:
    """A training run."""

    name: str = "run"
    """The run is kept in output_dir/name."""
    output_dir: str = "outputs"
    """Folder of all runs."""
    seed: int = 0
    """Decides initial weights, order of clips, noise: everything that is random."""
    resume: str = "auto"
    """auto: go on from the newest whole checkpoint of the run; never: refuse to; or a checkpoint's path."""
    init_from: str | None = None
    """Start from the weights of another run, checkpoint, pipeline or model folder, with a new optimizer."""
    dry_run: bool = False
    """Build everything, print what would be trained and what it takes, and write nothing."""
    model: STDiTConfig = field(default_factory=STDiTConfig)
    """The transformer."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    """From pixels to latents."""
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """From captions to states."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """The objective."""
    data: DataConfig = field(default_factory=DataConfig)
    """The clips."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Length and arithmetic."""
    parallel: TrainingParallelConfig = field(default_factory=TrainingParallelConfig)
    """Several processes."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How weights follow gradients."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    """Averaged weights."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is kept."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Videos made on the way."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """Where measurements go."""

    @property
    def run_folder(self) -> Path:
        return Path(self.output_dir) / self.name

    def validate(self) -> None:
        """Raise UserError for settings that do not go together."""
        parts = PurePosixPath(self.name).parts
        if not parts or ".." in parts or self.name.startswith("/"):
            raise UserError(f"name = {self.name!r}: must be a folder name, such as my-run")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed = {self.seed}: must be from 0 to 2^63 - 1")
        self.data.validate()
        if self.flow.prediction == "residual" and self.codec.name != "pca":
            raise UserError(
                f"flow.prediction = residual and codec.name = {self.codec.name}: residual needs a codec that "
                "knows the variance of its latents: use codec.name = pca, or flow.prediction = velocity"
            )
        if self.flow.conditioning and self.model.patch_size[0] > 1:
            raise UserError(
                f"flow.conditioning and model.patch_size = {list(self.model.patch_size)}: a frame can only be given "
                "where patches are one frame long: leave flow.conditioning out, or use a patch_size of [1, ...]"
            )


def parse_train(argv: Sequence[str] | None = None) -> TrainConfig:
    """The checked settings of ``train.py``. Raises UserError."""
    config = parse(TrainConfig, argv, DESCRIPTION, EXAMPLES)
    config.validate()
    return config


def experiment_key(config: TrainConfig) -> dict[str, Any]:
    """Dotted settings that a run must keep to be the same experiment; its length, its checkpoints, its
    validation and its tracker may change."""
    found = {
        key: value
        for group in EXPERIMENT
        for key, value in _leaves(getattr(config, group), group)
        if key not in FREE
    }
    if found["data.cache"] == "disk":  # the same batches
        found["data.cache"] = "memory"
    return found


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Dotted names and values (as JSON has them) of the fields of nested dataclasses."""
    if is_dataclass(value):
        for part in fields(value):
            yield from _leaves(getattr(value, part.name), f"{key}.{part.name}")
    else:
        yield key, plain(value)
