"""Train the codec "tiny", the small autoencoder whose weights come with the package.

    python scripts/make_shapes.py --output data/shapes
    python scripts/make_shapes.py --world 64 --num_clips 40000 --output data/shapes64
    python scripts/train_codec.py --config configs/codecs/tiny.yaml
    python train.py --config train/shapes64 --codec.path outputs/tiny

Run the same command again to resume an interrupted run. Clips are read as train.py reads them without a cache, and
what a step does follows from its number and the seed. The loss is that of the pixels, decoded from latents to which
noise was added.
"""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stdit.cli import run
from stdit.data.config import DataConfig
from stdit.errors import UserError
from stdit.pipelines.config import check_seed
from stdit.settings import parse, plain
from stdit.training.config import EMAConfig, OptimizerConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STATE_FILE = "training.state"
"""In the format of safetensors, but not a part of the codec."""
STATE_ASIDE = "training.tmp"
"""Name of the state while it is written."""
CELL = 8
"""Pixels of each side of the places that a crop is drawn from."""
LEAST_MOTION = 0.002
"""Added to the mean difference of each place, so that those where nothing moves are drawn, too."""
STATISTICS_RATE = 0.02
"""Share by which mean and variance of the latents move towards those of a step; at first they are averages."""


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


def main() -> None:
    config = parse(CodecTraining, doc=__doc__)
    folder = Path(config.output)
    unfinished = (folder / STATE_FILE).exists()  # it is deleted after the codec is saved
    if (folder / "codec.json").exists() and not unfinished:
        raise UserError(f"output = {folder}: holds a codec already: choose another folder, or delete it")
    train(config, folder)


def train(config: CodecTraining, folder: Path) -> None:
    """Do the steps that are left, and save the codec.

    Raises:
        UserError: if the folder cannot be written, its state is of other settings, or the loss is not finite.
    """
    from tqdm import tqdm

    from stdit.data.build import build_plan
    from stdit.data.clip_tensors import to_video
    from stdit.data.dataset import video_loader
    from stdit.pipelines.writer import check_writable

    data = config.data
    data.validate()
    check_writable(folder)
    trainer = CodecTrainer(config)
    start = trainer.resume(folder / STATE_FILE)
    plan = build_plan(data, config.seed)
    print(plan.report())
    workers = 0 if data.workers == "auto" else data.workers
    loader = video_loader(plan, workers, data.crop, data.max_skipped_share, flip=data.flip)
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=config.steps, initial=start, unit="step") as bar:
        for batch in loader(start, config.steps):
            assert batch.content is not None, "the plan has no empty bucket"
            loss = trainer.step(batch.info.step, to_video(batch.content))
            done = batch.info.step + 1
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of step {batch.info.step} is {loss}: lower optimizer.muon_lr and optimizer.lr, and "
                    "choose another output"
                )
            if done % config.save_every == 0:
                trainer.save(folder / STATE_FILE, done)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
    trainer.export(folder)
    (folder / STATE_FILE).unlink(missing_ok=True)
    print(f"codec: {folder}")


class CodecTrainer:
    """The codec with its optimizer and averaged weights, and the training step."""

    def __init__(self, config: CodecTraining) -> None:
        import torch

        from stdit.codecs.tiny import TinyCodec
        from stdit.training.ema import EMA
        from stdit.training.optim import Optimizers, muon_and_adamw

        self.config = config
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.codec = TinyCodec(config.channels, config.widths).train().requires_grad_(True)
        named = dict(self.codec.named_parameters())
        kernels = {name: 1 for name, parameter in named.items() if parameter.ndim == 4}
        self.optimizer = Optimizers(named, muon_and_adamw(self.codec, config.optimizer, kernels))
        self.ema = EMA(self.codec, config.ema)

    def step(self, step: int, video: "Tensor") -> float:
        """Train on videos ``[B 3 T H W]``; the loss that it returns follows from them, (seed, step) and the state."""
        import torch
        from torch.nn.utils import clip_grad_norm_

        from stdit.diffusion.draws import sample_generator
        from stdit.training.optim import learning_rate_factor

        config, codec = self.config, self.codec
        generator = sample_generator(config.seed, step, 0)
        video = codec.pad_video(video)
        groups, later = draw_groups(video, config.groups, generator)
        groups = crop_to_motion(groups, later, config.crop, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            latents = codec.normalise(
                codec.encode_groups(groups).float(), rate=max(STATISTICS_RATE, 1 / (step + 1))
            )
            level = config.noise * torch.rand(len(groups), 1, 1, 1, generator=generator)
            noisy = latents + level * torch.randn(latents.shape, generator=generator)
            error = codec.decode_groups(noisy).float() - groups
        loss = error.abs().mean() + 2 * error.square().mean()
        loss.backward()
        clip_grad_norm_(codec.parameters(), 1.0)
        self.optimizer.step(learning_rate_factor(config.optimizer, step, config.steps))
        self.optimizer.zero_grad()
        self.ema.update(codec, step)
        return loss.item()

    def save(self, file: Path, done: int) -> None:
        """Write the state after ``done`` steps, for `resume`."""
        from safetensors.torch import save_file

        from stdit.training.disk import disk_errors

        parts = {"codec": self.codec, "average": self.ema, "optimizer": self.optimizer}
        tensors = {
            f"{part}:{name}": tensor.contiguous()
            for part, owner in parts.items()
            for name, tensor in owner.state_dict().items()
        }
        aside = file.with_name(STATE_ASIDE)
        with disk_errors(str(file), aside):
            save_file(tensors, aside, {"steps": str(done), "settings": json.dumps(self.config.fixed)})
            aside.replace(file)

    def resume(self, file: Path) -> int:
        """Read the state, if there is one, and return the number of steps done.

        Raises:
            UserError: if it is damaged, or of other settings.
        """
        from safetensors import SafetensorError, safe_open

        if not file.exists():
            return 0
        try:
            with safe_open(file, "pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
                written = stored.metadata()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read ({error}): delete it to begin again") from None
        before, now = json.loads(written.get("settings", "{}")), self.config.fixed
        if changed := [name for name in before if before[name] != now.get(name)]:
            raise UserError(
                f"{file} is of another training: {', '.join(changed)} differ: give the same settings, or choose "
                "another output"
            )
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in ("codec", "average", "optimizer")}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(":")
            parts[part][rest] = tensor
        self.codec.load_state_dict(parts["codec"])
        self.ema.average.update(parts["average"])
        self.optimizer.load_state_dict(parts["optimizer"])
        return int(written["steps"])

    def export(self, folder: Path) -> None:
        """Write the codec with the averaged weights, its kernels in bf16."""
        from stdit.codecs.compact_weights import compact_folder
        from stdit.training.disk import disk_errors

        with disk_errors(f"codec {folder}", folder / STATE_ASIDE), self.ema.applied(self.codec):
            self.codec.save_pretrained(folder)
            compact_folder(folder, "bf16")


def draw_groups(video: "Tensor", count: int, generator: "torch.Generator") -> "tuple[Tensor, Tensor]":
    """Draw ``count`` groups of frames of each video ``[B 3 T H W]``, or all if there are fewer.

    Returns:
        The groups ``[N 3 4 H W]``, and for each the frame half a video after its first one, ``[N 3 H W]``.
    """
    import torch

    from stdit.codecs.tiny import FRAMES, split_groups

    frames = video.shape[2]
    groups, later = [], []
    for clip, own in zip(video, split_groups(video).unflatten(0, (len(video), -1)), strict=True):
        drawn = torch.randperm(len(own), generator=generator)[:count]
        first = ((drawn - 1) * FRAMES + 1).clamp(min=0)
        groups.append(own[drawn])
        later.append(clip[:, (first + frames // 2) % frames].transpose(0, 1))
    return torch.cat(groups), torch.cat(later)


def crop_to_motion(groups: "Tensor", later: "Tensor", size: int, generator: "torch.Generator") -> "Tensor":
    """Crop each group of frames to size x size pixels, with a preference for where the video moves.

    Most of a frame may be background, which is learned soon. A place is drawn in proportion to how much the group's
    first frame differs there from a later one.

    Args:
        groups: [N 3 4 H W].
        later: a frame for each, [N 3 H W].

    Returns: [N 3 4 size size], or the groups as they are if they are not larger.
    """
    import torch
    from torch.nn.functional import avg_pool2d

    height, width = groups.shape[-2:]
    if size >= min(height, width):
        return groups
    moved = avg_pool2d((groups[:, :, 0] - later).abs().mean(1, keepdim=True), CELL)  # [N 1 rows columns]
    cells = torch.multinomial(moved.flatten(1) + LEAST_MOTION, 1, generator=generator)[:, 0]
    rows, columns = cells // moved.shape[-1], cells % moved.shape[-1]
    inside = torch.randint(CELL, (2, len(groups)), generator=generator)
    tops = (rows * CELL + inside[0] - size // 2).clamp(0, height - size).tolist()
    lefts = (columns * CELL + inside[1] - size // 2).clamp(0, width - size).tolist()
    places = zip(groups, tops, lefts, strict=True)
    return torch.stack([group[..., y : y + size, x : x + size] for group, y, x in places])


if __name__ == "__main__":
    run(main)
