"""Settings of scripts/train_codec.py. Imports no torch."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stdit.codecs.config import check_tiny_layers
from stdit.data.config import DataConfig
from stdit.errors import UserError
from stdit.pipelines.config import check_seed
from stdit.settings import plain
from stdit.training.config import EMAConfig, OptimizerConfig


@dataclass
class CodecTraining:
    """The data, and how to train."""

    output: str = "outputs/tiny"
    """Folder of the codec; while it is trained, of the state to resume from."""
    seed: int = 0
    """Seed of the weights, the batches and the noise."""
    data: DataConfig = field(default_factory=DataConfig)
    """Clips; batch_size of a bucket is the clips of a step."""
    channels: int = 16
    """Channels of the latents."""
    widths: tuple[int, int, int] = (48, 96, 160)
    """Channels of the layers, multiples of 16: see `stdit.codecs.tiny.TinyCodec`."""
    groups: int = 2
    """Groups of four frames that a step takes of each clip: few, so that a step shows many scenes."""
    crop: int = 32
    """Pixels of each side that a group of frames is cropped to, mostly where something moves; a multiple of 8. Larger
    than the videos: no crop."""
    noise: float = 0.5
    """Largest standard deviation of the noise on the latents, whose own is 1; each group of frames draws its own."""
    steps: int = 20000
    """Steps in all."""
    save_every: int = 500
    """Steps between states to resume from."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the codec; weights and loss stay in float32."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            name="muon",
            muon_lr=2e-2,
            muon_momentum=0.9,
            lr=2e-3,
            betas=(0.9, 0.95),
            warmup_steps=50,
            schedule="linear",
            decay_share=0.5,
        )
    )
    """Rates of Muon, for the kernels, and of AdamW, for all else."""
    ema: EMAConfig = field(default_factory=lambda: EMAConfig(decay=0.998))
    """The average of the weights, which is what is saved."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_tiny_layers(self.channels, self.widths)
        if not 0 <= self.noise < 10:
            raise UserError(f"noise = {self.noise}: must be from 0 (none) to 10, such as 0.5")
        if self.crop < 8 or self.crop % 8:
            raise UserError(f"crop = {self.crop}: must be a multiple of 8 pixels, such as 32")
        for name in ("groups", "steps", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.optimizer.name != "muon":
            raise UserError(
                f"optimizer.name = {self.optimizer.name}: the codec is trained with muon: leave it out"
            )
        if self.data.cache != "none":
            raise UserError(
                f"data.cache = {self.data.cache}: pixels are not cached: leave it out, or set it to none"
            )

    @property
    def fixed(self) -> dict[str, Any]:
        """The settings that must stay the same when training resumes."""
        settings = plain(replace(self, data=replace(self.data, workers=0)))
        return {name: value for name, value in settings.items() if name not in ("output", "save_every")}
