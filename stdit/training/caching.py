"""Fill and prune a cache, for the runs that read it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from stdit.codecs import build_codec
from stdit.data.cache.codec_fitting import fitted_name
from stdit.data.cache.encode import EncodeSummary, encode_plan, wanted_keys
from stdit.data.cache.maintenance import PruneSummary, prune_cache
from stdit.data.skips import SkipTally
from stdit.training.batches import reader_of, workers_of
from stdit.training.build import build_inputs
from stdit.training.config import TrainConfig


def fill_cache(
    config: TrainConfig, device: torch.device | str = "cpu", part: tuple[int, int] = (0, 1)
) -> EncodeSummary:
    """Encode everything that a run of these settings reads into its cache: every augmented view, every caption.

    Args:
        config: with data.cache memory or disk; none counts as disk.
        device: of codec and text encoder.
        part: (k, n): the k-th, from 0 on, of n processes that share the work, on any machines with the same folder.

    Raises:
        UserError: if settings or data are invalid, or the cache cannot be written.
    """
    inputs = build_inputs(_with_cache(config))
    inputs.codec.to(device)
    inputs.text_encoder.to(device)
    tally = SkipTally(inputs.plan.assignment.files, config.data.max_skipped_share)
    prompts = config.validation.prompts
    reader = reader_of(inputs, workers_of(inputs, device))
    return encode_plan(
        reader, inputs.codec, inputs.text_encoder, prompts, device=device, part=part, tally=tally
    )


def prune_unused(folder: Path, configs: Sequence[TrainConfig] = (), dry_run: bool = False) -> PruneSummary:
    """Remove what is broken from a cache; with configs, also the entries and codecs that no run of them reads.

    Raises UserError if settings or data are invalid, or files cannot be removed.
    """
    if not configs:
        return prune_cache(folder, dry_run=dry_run)
    keys: set[bytes] = set()
    codecs: set[str] = set()
    for config in configs:
        config = _with_cache(replace(config, data=replace(config.data, cache_dir=str(folder))))
        inputs = build_inputs(config)
        keys.update(wanted_keys(reader_of(inputs), config.validation.prompts))
        codec = build_codec(config.codec)
        if not getattr(codec, "fitted", True):
            codecs.add(fitted_name(codec, inputs.plan, config.data))
    return prune_cache(folder, keys, codecs, dry_run)


def _with_cache(config: TrainConfig) -> TrainConfig:
    """Return the settings with data.cache disk instead of none."""
    data = config.data
    return replace(config, data=replace(data, cache="disk")) if data.cache == "none" else config
