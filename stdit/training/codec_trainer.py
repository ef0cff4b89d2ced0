"""Train the codec "tiny": what scripts/train_codec.py does in a step, its state and its result."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.nn.utils import clip_grad_norm_

from stdit.codecs.compact_weights import compact_folder
from stdit.codecs.tiny import FRAMES, TinyCodec, split_groups
from stdit.diffusion.draws import sample_generator
from stdit.errors import UserError
from stdit.training.codec_config import CodecTraining
from stdit.training.disk import disk_errors
from stdit.training.ema import EMA
from stdit.training.optim import Optimizers, learning_rate_factor, muon_and_adamw

_STATE_ASIDE = "training.tmp"
"""Name of the state while it is written."""
_CELL = 8
"""Pixels of each side of the places that a crop is drawn from."""
_LEAST_MOTION = 0.002
"""Added to the mean difference of each place, so that those where nothing moves are drawn, too."""
_STATISTICS_RATE = 0.02
"""Share by which mean and variance of the latents move towards those of a step; at first they are averages."""


class CodecTrainer:
    """The codec with its optimizer and averaged weights, and the training step."""

    def __init__(self, config: CodecTraining) -> None:
        self.config = config
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.codec = TinyCodec(config.channels, config.widths).train().requires_grad_(True)
        named = dict(self.codec.named_parameters())
        kernels = {name: 1 for name, parameter in named.items() if parameter.ndim == 4}
        self.optimizer = Optimizers(named, muon_and_adamw(self.codec, config.optimizer, kernels))
        self.ema = EMA(self.codec, config.ema)

    def step(self, step: int, video: Tensor) -> float:
        """Train on videos ``[B 3 T H W]``; the loss that it returns follows from them, (seed, step) and the state."""
        config, codec = self.config, self.codec
        generator = sample_generator(config.seed, step, 0)
        video = codec.pad_video(video)
        groups, later = draw_groups(video, config.groups, generator)
        groups = crop_to_motion(groups, later, config.crop, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            latents = codec.normalise(
                codec.encode_groups(groups).float(), rate=max(_STATISTICS_RATE, 1 / (step + 1))
            )
            level = config.noise * torch.rand(len(groups), 1, 1, 1, generator=generator)
            noisy = latents + level * torch.randn(latents.shape, generator=generator)
            error = codec.decode_groups(noisy).float() - groups
        loss = error.abs().mean() + 2 * error.square().mean()
        loss.backward()
        clip_grad_norm_(codec.parameters(), 1.0)
        self.optimizer.set_factor(learning_rate_factor(config.optimizer, step, config.steps))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(step)
        return loss.item()

    def save(self, file: Path, done: int) -> None:
        """Write the state after ``done`` steps, for `resume`."""
        parts = {"codec": self.codec, "average": self.ema, "optimizer": self.optimizer}
        tensors = {
            f"{part}:{name}": tensor.contiguous()
            for part, owner in parts.items()
            for name, tensor in owner.state_dict().items()
        }
        aside = file.with_name(_STATE_ASIDE)
        with disk_errors(str(file), aside):
            save_file(tensors, aside, {"steps": str(done), "settings": json.dumps(self.config.fixed)})
            aside.replace(file)

    def resume(self, file: Path) -> int:
        """Read the state, if there is one, and return the number of steps done.

        Raises:
            UserError: if it is damaged, or of other settings.
        """
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
        with disk_errors(f"codec {folder}", folder / _STATE_ASIDE), self.ema.applied(self.codec):
            self.codec.save_pretrained(folder)
            compact_folder(folder)


def draw_groups(video: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw ``count`` groups of frames of each video ``[B 3 T H W]``, or all if there are fewer.

    Returns:
        The groups ``[N 3 4 H W]``, and for each the frame half a video after its first one, ``[N 3 H W]``.
    """
    frames = video.shape[2]
    groups, later = [], []
    for clip, own in zip(video, split_groups(video).unflatten(0, (len(video), -1)), strict=True):
        drawn = torch.randperm(len(own), generator=generator)[:count]
        first = ((drawn - 1) * FRAMES + 1).clamp(min=0)
        groups.append(own[drawn])
        later.append(clip[:, (first + frames // 2) % frames].transpose(0, 1))
    return torch.cat(groups), torch.cat(later)


def crop_to_motion(groups: Tensor, later: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Crop each group of frames to size x size pixels, with a preference for where the video moves.

    Most of a frame may be background, which is learned soon. A place is drawn in proportion to how much the group's
    first frame differs there from a later one.

    Args:
        groups: [N 3 4 H W].
        later: a frame for each, [N 3 H W].

    Returns: [N 3 4 size size], or the groups as they are if they are not larger.
    """
    height, width = groups.shape[-2:]
    if size >= min(height, width):
        return groups
    moved = avg_pool2d((groups[:, :, 0] - later).abs().mean(1, keepdim=True), _CELL)  # [N 1 rows columns]
    cells = torch.multinomial(moved.flatten(1) + _LEAST_MOTION, 1, generator=generator)[:, 0]
    rows, columns = cells // moved.shape[-1], cells % moved.shape[-1]
    inside = torch.randint(_CELL, (2, len(groups)), generator=generator)
    tops = (rows * _CELL + inside[0] - size // 2).clamp(0, height - size).tolist()
    lefts = (columns * _CELL + inside[1] - size // 2).clamp(0, width - size).tolist()
    places = zip(groups, tops, lefts, strict=True)
    return torch.stack([group[..., y : y + size, x : x + size] for group, y, x in places])
