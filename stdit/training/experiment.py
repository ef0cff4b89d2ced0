"""The settings that make a run the experiment that it is. Imports no torch."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from stdit.settings import plain
from stdit.training.config import TrainConfig

EXPERIMENT = ("imports", "seed", "model", "codec", "text_encoder", "flow", "data", "optimizer", "ema")
"""Groups of settings that a run must keep to be the same experiment."""
FREE = {
    "codec.path",
    "codec.subfolder",
    "text_encoder.path",
    "text_encoder.subfolder",
    "data.manifest",
    "data.root",
    "data.cache_dir",
    "data.sources",
    "data.regularisation.manifest",
    "data.regularisation.root",
    "data.workers",
    "data.max_skipped_share",
    "lora.init_from",
    "lora.merge",
    "lora.other_base",
    "lora.base_dtype",
    "model.in_channels",
    "model.caption_channels",
    "model.model_max_length",
}
"""Settings of those groups that may change when a run resumes. Paths may move, because a hash identifies what they
lead to. The sizes that the model takes from codec and text encoder follow from these two."""


def experiment_key(config: TrainConfig) -> dict[str, Any]:
    """Return the settings, by dotted name, that a run must keep to be the same experiment.

    Its length, checkpoints, validation and tracker may change. The model of an adapter or of a student is that of
    ``init_from``, which the hash of its weights identifies, whatever the settings ask for.
    """
    special = ["lora"] if config.lora.rank is not None else ["distill"] if config.has_teacher else []
    groups = [name for name in (*EXPERIMENT, *special) if not special or name != "model"]
    found = {
        key: value
        for group in groups
        for key, value in _leaves(getattr(config, group), group)
        if key not in FREE
    }
    if found["data.cache"] == "disk":  # the same batches
        found["data.cache"] = "memory"
    return found


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted name and value (as JSON has it) of each field of nested dataclasses."""
    if is_dataclass(value):
        for part in fields(value):
            yield from _leaves(getattr(value, part.name), f"{key}.{part.name}")
    else:
        yield key, plain(value)
