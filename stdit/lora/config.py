"""Settings of low-rank adapters. Imports no torch."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stdit.checkpoint_files import PICKLES
from stdit.errors import UserError
from stdit.hashing import hash_file
from stdit.lora.header import read_header
from stdit.models.config import BLOCK_KINDS

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""Name of the file in a folder, as diffusers has it."""
NAME_PREFIX = "lora_"
"""Of the names of adapters for sampling in a model."""

BaseDtype = Literal["fp32", "bf16", "int8", "nf4"]
"""How the weights that an adapter is trained on are kept; nf4: 4-bit normal floats."""
TARGETS = {
    "attention": r"^blocks\..*attn\.",
    "mlp": r"^blocks\..*\.mlp\.",
    "blocks": r"^blocks\.",
}
"""Named targets: regular expressions, found in the names of linear layers. See also `BLOCK_TARGETS`."""
BLOCK_TARGETS = tuple(BLOCK_KINDS.values())
"""Targets that are all linear layers in the blocks of this kind."""


@dataclass
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), trained instead of the weights, which stay the same."""

    rank: int | None = None
    """Rank r of each adapter; none: train the weights themselves."""
    alpha: float | None = None
    """Adapters are scaled by alpha / rank (rslora: alpha / sqrt(rank)); none: the rank."""
    targets: str = "attention"
    """Linear layers that have one: attention, mlp, blocks (both), spatial or temporal (those of such blocks: temporal
    ones are a motion LoRA), or a regular expression that is found in their names."""
    dropout: float = 0.0
    """Share of the input channels of layers in the blocks that their adapters do not see in training: others in each
    sample and step, and the same ones in all tokens of a sample."""
    dora: bool = False
    """Learn the length of each row of a layer's weights apart from its direction (Liu et al. 2024,
    arXiv:2402.09353)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), for high ranks (Kalajdzievski 2023, arXiv:2312.03732)."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise UserError(f"lora.rank = {self.rank}: must be at least 1, such as 16")
        if self.alpha is not None and not self.alpha > 0:
            raise UserError(f"lora.alpha = {self.alpha}: must be positive, such as the rank")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout = {self.dropout}: must be at least 0 and below 1")
        names = (*TARGETS, *BLOCK_TARGETS)
        if not set(self.targets.split("|")) <= set(names):
            named = set(re.split(r"[\[\]\"', |]+", self.targets)) & set(names)
            if not self.targets or named:
                raise UserError(
                    f"lora.targets = {self.targets!r}: must be of the names {', '.join(names)}, joined by |, or a "
                    "regular expression for the names of layers, such as mlp\\. instead of mlp."
                )
            try:
                re.compile(self.targets)
            except re.error as error:
                raise UserError(
                    f"lora.targets = {self.targets!r}: is neither {', '.join(names)} nor a regular expression "
                    f"({error})"
                ) from None


@dataclass(frozen=True)
class LoRASpec:
    """An adapter for sampling."""

    file: Path
    weight: float
    """What it adds to the layers is multiplied by this."""
    hash: str
    """Of the file."""

    @property
    def name(self) -> str:
        """Name of the adapter in a model: that of its content."""
        return NAME_PREFIX + self.hash.partition(":")[2][:16]


def split_lora(text: str, where: str = "") -> tuple[str, float]:
    """Split ``FILE`` or ``FILE:WEIGHT``. Raises UserError, beginning with ``where``, if it is neither."""
    path, colon, number = text.rpartition(":")
    try:
        weight = float(number) if colon else 1.0
    except ValueError:
        colon, weight = "", 1.0
    if not colon or Path(text).exists():  # a colon in the name
        path, weight = text, 1.0
    if not path.strip():
        raise UserError(f"{where}lora = {text!r}: names no file: give FILE or FILE:WEIGHT, or leave it out.")
    if not math.isfinite(weight):
        raise UserError(f"{where}lora = {text}: the weight must be a finite number, such as 0.8.")
    return path, weight


def parse_lora(text: str, where: str = "") -> LoRASpec:
    """Parse ``FILE`` or ``FILE:WEIGHT``; FILE may be a folder with an adapter, whose header is checked.

    Args:
        where: begins messages.

    Raises:
        UserError: if there is no such file, it is a pickle, `read_header` refuses it, or the weight is not finite.
    """
    path, weight = split_lora(text, where)
    try:
        file = find_adapter_file(Path(path))
        read_header(file)
    except UserError as error:
        name, colon, number = path.rpartition(":")
        hint = f" ({number!r} is no number to be a weight.)" if colon and Path(name).exists() else ""
        raise UserError(f"{where}{error}{hint}") from None
    return LoRASpec(file, weight, hash_file(file))


def find_initial_adapter(text: str) -> Path:
    """Return the file of ``lora.init_from``, whose header is checked. Raises UserError also if it has a weight."""
    path, _ = split_lora(text)
    if path != text and not Path(text).exists():
        raise UserError(
            f"lora.init_from = {text}: cannot have a weight, since training begins with the adapter as it is: give "
            f"{path}; or merge it, with a weight, by lora.merge."
        )
    file = find_adapter_file(Path(text))
    read_header(file)
    return file


def find_adapter_file(path: Path) -> Path:
    """Return the file of a path that is one, or of a folder that has one.

    Raises:
        UserError: there is none, or it is a pickle.
    """
    if path.is_dir():
        inside = path / ADAPTER_FILE
        if inside.is_file():
            return inside
        others = sorted(path.glob("*.safetensors"))
        if len(others) == 1:
            return others[0]
        what = f"has {len(others)} .safetensors files: name one" if others else "has no .safetensors file"
        raise UserError(f"lora {path}: this folder {what}.")
    if not path.is_file():
        raise UserError(f"lora {path}: there is no such file or folder.")
    if path.suffix.lower() in PICKLES:
        raise UserError(
            f"lora {path}: is a pickle, and reading one can run anything: use a copy in safetensors."
        )
    return path
