"""Read the weights of a checkpoint, or those that a training begins with: one after the other, in memory once."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig as PeftConfig
from torch import Tensor, nn

from stdit.checkpoint_files import read_json, read_meta, verify_if_sealed
from stdit.errors import UserError
from stdit.lora.adapters import merge_adapter
from stdit.lora.config import BaseDtype, parse_lora
from stdit.lora.files import hash_of_weights, merge_adapters
from stdit.models.config import STDiTConfig
from stdit.models.low_bit import layers_to_round, make_low_bit, round_weight
from stdit.models.opensora import stdit_names
from stdit.models.stdit import STDiT
from stdit.parallel.processes.parameters import trained_state
from stdit.parallel.processes.storage import StoredTensors
from stdit.pipelines.sources import find_initial_weights, is_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InitialWeights:
    """The model of ``init_from``."""

    source: str
    """As the settings name it."""
    settings: STDiTConfig
    shapes: Mapping[str, Sequence[int]]
    """By name."""
    each: Callable[[], Iterable[tuple[str, Tensor]]]
    """Yields names and tensors."""

    def check_fits(self, model: nn.Module) -> None:
        """Raise UserError unless these are the weights of a model, by kind of block, name and shape."""
        for name in ("blocks", "linear_causal") if isinstance(model, STDiT) else ():
            there, here = (
                value if name == "blocks" else str(value).lower()
                for value in (getattr(self.settings, name), getattr(model.config, name))
            )
            if there != here and (name == "blocks" or "L" in self.settings.blocks):
                raise UserError(
                    f"init_from = {self.source}: its model has model.{name} = {there}, and this one {here}: the same "
                    f"weights would compute something else. Set --model.{name} '{there}', or leave init_from out."
                )
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = {name: tuple(shape) for name, shape in self.shapes.items()}
        odd = [name for name in {**shapes, **found} if shapes.get(name) != found.get(name)]
        if odd:
            raise UserError(
                f"init_from = {self.source}: its model is a different one: {len(odd)} weights differ, such as "
                f"{odd[0]}, {found.get(odd[0], 'absent')} there and {shapes.get(odd[0], 'absent')} here. Use its "
                "settings (model.*, codec.*, text_encoder.*), or leave init_from out."
            )

    def copy_to(self, model: nn.Module) -> None:
        """Copy the weights into a model. Raises as `check_fits` does."""
        self.check_fits(model)
        own = model.state_dict()
        for name, tensor in self.each():
            own[name].copy_(tensor)

    def frozen_model(self, dtype: BaseDtype) -> tuple[STDiT, str]:
        """Return a model of these weights that is not trained, and their hash.

        Args:
            dtype: of the weights; int8 and nf4 are for the layers of `layers_to_round`, beside which all is bf16.
        """
        with torch.device("meta"):
            model = STDiT(**asdict(self.settings))
        self.check_fits(model)
        rounded = set()
        if dtype in ("int8", "nf4"):
            rounded = set(layers_to_round(model))
            make_low_bit(model, rounded)

        def kept(layer: str, name: str, tensor: Tensor) -> Tensor:
            if layer in rounded and name == "weight":
                return round_weight(tensor, dtype)  # type: ignore[arg-type]
            return tensor.to(torch.float32 if dtype == "fp32" else torch.bfloat16)

        def hashed() -> Iterable[tuple[str, Tensor]]:
            for full_name, tensor in self.each():
                layer, _, name = full_name.rpartition(".")
                setattr(
                    model.get_submodule(layer),
                    name,
                    nn.Parameter(kept(layer, name, tensor), requires_grad=False),
                )
                yield full_name, tensor

        found = hash_of_weights(hashed())
        return model.eval(), found


def open_initial_weights(source: str) -> InitialWeights:
    """Open the model of ``init_from``: a run, checkpoint, pipeline or model folder; the averages of a checkpoint.

    Raises:
        UserError: if there is none, or its files are damaged.
    """
    folder = find_initial_weights(source)
    of_run = is_checkpoint(folder)
    if of_run and "adapter" in (meta := read_meta(folder)):
        return _weights_of(load_transformer(folder, meta, ema=True)[0], source)
    recorded = read_json((folder / "model" if of_run else folder) / "config.json", "a model")
    if "quantization_config" in recorded:
        raise UserError(
            f"init_from = {source}: its weights are quantised, and a training begins with those that they were made "
            "of: give that model, and --lora.base_dtype int8 or nf4 for an adapter on rounded weights."
        )
    settings = STDiTConfig.read(recorded)
    if of_run:
        files = folder / weights_folder(folder, meta, ema=True)
    else:
        verify_if_sealed(files := folder)
    stored = StoredTensors(files, stdit_names(asdict(settings)))
    shapes = {name: found.shape for name, found in stored.tensors().items()}
    return InitialWeights(source, settings, shapes, stored.each)


def _weights_of(model: STDiT, source: str) -> InitialWeights:
    weights = model.state_dict()
    return InitialWeights(
        source,
        STDiTConfig.read(model.config),
        {name: tensor.shape for name, tensor in weights.items()},
        weights.items,
    )


class FrozenModel(NamedTuple):
    """The model that an adapter is trained on, or a student learns from, as checkpoints record it."""

    hash: str
    """Of its weights, with merged adapters, before they are rounded."""
    path: str
    """Absolute; of a checkpoint or model folder, not of a run, which may have a newer one tomorrow."""
    merge: list[str]
    """Adapters that are merged into it first, FILE:weight, with absolute paths."""


def read_base(
    source: str, merge: Sequence[str], any_base: bool = True, dtype: BaseDtype = "fp32"
) -> tuple[STDiT, FrozenModel]:
    """Read the model that an adapter is trained on, or a student learns from, and say what it is.

    Args:
        source: as ``init_from``.
        merge: adapters that are merged into it first, FILE[:weight]; it is then read in fp32.
        any_base: also those that say that they were trained on other weights.
        dtype: of its weights, as in `InitialWeights.frozen_model`.

    Raises:
        UserError: if it or an adapter cannot be read, or they do not fit.
    """
    folder, loras = find_initial_weights(source).resolve(), [parse_lora(text) for text in merge]
    initial = open_initial_weights(str(folder))
    if loras:
        model, _ = initial.frozen_model("fp32")
        merge_adapters(model, loras, any_base, "--lora.other_base")
        initial = _weights_of(model, source)
    model, found = initial.frozen_model(dtype)
    merged = [f"{lora.file.resolve()}:{lora.weight!r}" for lora in loras]
    return model, FrozenModel(found, str(folder), merged)


def load_transformer(folder: Path, meta: dict[str, Any], ema: bool) -> tuple[Any, str]:
    """Load the STDiT of a verified checkpoint; return it and the folder of its weights, ema or model.

    A checkpoint of an adapter gives its base with the adapter merged into it.
    """
    used = weights_folder(folder, meta, ema)
    if "model/config.json" not in meta["files"]:
        raise UserError(f"checkpoint {folder} lacks model/config.json: use another checkpoint.")
    if "adapter" in meta:
        transformer = _load_base(folder, meta)
        StoredTensors(folder / used).read_into(trained_state(transformer))
        merge_adapter(transformer)
    else:
        transformer = STDiT.from_config(STDiT.load_config(folder / "model"))
        StoredTensors(folder / used, stdit_names(transformer.config)).read_into(transformer.state_dict())
    return transformer.eval(), used


def weights_folder(folder: Path, meta: dict[str, Any], ema: bool) -> str:
    """Return which folder of a checkpoint has the weights to use: ema or model."""
    has_average = any(name.startswith("ema/") for name in meta["files"])
    averaged = meta.get("config", {}).get("ema", {}).get("decay") != 0
    if ema and averaged and not has_average:
        logger.warning("checkpoint %s has no averaged weights: using the model's own", folder)
    return "ema" if ema and has_average else "model"


def _load_base(folder: Path, meta: dict[str, Any]) -> Any:
    """Return the base of a checkpoint's adapter, and in it an adapter whose weights are still to be read.

    Raises:
        UserError: if it is missing, or has other weights than in training.
    """
    base = meta["base"]
    if not Path(base["path"]).exists():
        raise UserError(
            f"checkpoint {folder}: holds an adapter, and {base['path']}, whose weights it was trained on, is no "
            "more: put it there again, or sample from a copy of it with --lora and the adapter."
        )
    model, found = read_base(base["path"], base["merge"])
    if found.hash != base["hash"]:
        raise UserError(
            f"checkpoint {folder}: its adapter was trained on the weights {base['hash']}, but {base['path']} has "
            f"{found.hash}: put the former there again, or give the adapter by --lora, with --lora_other_base."
        )
    model.requires_grad_(False)
    model.add_adapter(PeftConfig(**meta["adapter"]), "default")
    return model
