"""Filling and pruning a cache for the runs that read it, from their settings."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from stdit.data.cache.care import PruneSummary, prune
from stdit.data.cache.encode import EncodeSummary, encode_plan, wanted_keys
from stdit.data.skips import SkipTally
from stdit.training.batches import reader_of
from stdit.training.build import build_inputs
from stdit.training.config import TrainConfig


def encode(
    config: TrainConfig, device: torch.device | str = "cpu", part: tuple[int, int] = (0, 1)
) -> EncodeSummary:
    """Fill the cache with what a run of these settings reads: every view, every caption.

    Args:
        config: with data.cache memory or disk; none counts as disk.
        device: of codec and text encoder.
        part: (number, of how many) of processes that share the work, on any machines with the same folder.

    Raises:
        UserError: for settings or data that will not do, or a disk that refuses.
    """
    inputs = build_inputs(cached(config))
    inputs.codec.to(device)
    inputs.text_encoder.to(device)
    tally = SkipTally(inputs.plan.assignment.files, config.data.max_skipped_share)
    prompts = config.validation.prompts
    return encode_plan(
        reader_of(inputs), inputs.codec, inputs.text_encoder, prompts, device=device, part=part, tally=tally
    )


def prune_cache(folder: Path, configs: Sequence[TrainConfig] = (), dry_run: bool = False) -> PruneSummary:
    """Remove from a cache what is broken, and, if configs are given, what runs of none of them read.

    Raises UserError for settings or data that will not do, or a disk that refuses.
    """
    if not configs:
        return prune(folder, dry_run=dry_run)
    keys: set[bytes] = set()
    for config in configs:
        inputs = build_inputs(cached(replace(config, data=replace(config.data, cache_dir=str(folder)))))
        keys.update(wanted_keys(reader_of(inputs), config.validation.prompts))
    return prune(folder, keys, dry_run)


def cached(config: TrainConfig) -> TrainConfig:
    """The settings with a cache."""
    data = config.data
    return replace(config, data=replace(data, cache="disk")) if data.cache == "none" else config
