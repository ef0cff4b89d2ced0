"""Settings that are set, but have no effect beside the others. Imports no torch."""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from stdit.codecs.config import CODECS
from stdit.training.config import TrainConfig

Rule = tuple[str, str, Callable[[TrainConfig], bool]]


def _on_gpu(config: TrainConfig) -> bool:
    from stdit.parallel.processes.mesh import runs_on_cpu

    return not runs_on_cpu(config.trainer.device)


RULES: tuple[Rule, ...] = (
    (
        "codec.stride codec.channels codec.fit_clips",
        "codec.name = pca without codec.path",
        lambda c: CODECS.module(c.codec.name) is not None or (c.codec.name == "pca" and c.codec.path is None),
    ),
    ("codec.subfolder", "codec.path", lambda c: c.codec.path is not None),
    ("codec.dtype", "a VAE", lambda c: c.codec.name not in ("pixel", "pca", "tiny")),
    (
        "text_encoder.max_length text_encoder.layers text_encoder.clean_captions text_encoder.dtype",
        "a text encoder, which has computed stored states already",
        lambda c: c.text_encoder.name != "stored",
    ),
    (
        "text_encoder.subfolder",
        "text_encoder.path of an encoder",
        lambda c: c.text_encoder.path is not None and c.text_encoder.name != "stored",
    ),
    (
        "flow.logit_mean flow.logit_std",
        "flow.timestep_sampling = logit_normal",
        lambda c: c.flow.timestep_sampling == "logit_normal",
    ),
    ("distill.score_updates distill.score_lr", "distill.steps", lambda c: bool(c.distill.steps)),
    ("lora.*", "lora.rank", lambda c: c.lora.rank is not None),
    ("memory.offload_optimizer", "GPUs", _on_gpu),
    ("memory.activations", "GPUs", lambda c: "offload" not in c.memory.activations or _on_gpu(c)),
    (
        "data.regularisation.root data.regularisation.share",
        "data.regularisation.manifest",
        lambda c: c.data.regularisation.manifest is not None,
    ),
    ("data.cache_dir", "data.cache = disk or memory", lambda c: c.data.cache != "none"),
    ("optimizer.muon_*", "optimizer.name = muon", lambda c: c.optimizer.name != "adamw"),
    (
        "optimizer.decay_share optimizer.final_share",
        "optimizer.schedule = cosine or linear",
        lambda c: c.optimizer.schedule != "constant",
    ),
    (
        "trainer.spike.window trainer.spike.exclude_batches trainer.spike.max_spikes",
        "trainer.spike.factor",
        lambda c: c.trainer.spike.factor is not None,
    ),
    ("model.linear_causal", "L in model.blocks", lambda c: "L" in c.model.blocks),
    ("parallel.overlap_chunks", "parallel.sp above 1", lambda c: c.parallel.sp != 1),
    (
        "parallel.link_gbit parallel.latency_us parallel.tflops",
        "parallel.sp above 1, and parallel.grid = auto",
        lambda c: c.parallel.sp != 1 and c.parallel.grid == "auto",
    ),
    ("checkpoint.keep_best", "validation.loss_every", lambda c: c.validation.loss_every is not None),
    (
        "validation.loss_manifest validation.loss_clips validation.loss_levels",
        "validation.loss_every",
        lambda c: c.validation.loss_every is not None,
    ),
    (
        "validation.every validation.seed",
        "validation.prompts or validation.captions",
        lambda c: bool(c.validation.prompts or c.validation.captions),
    ),
    ("validation.min_improvement", "validation.patience", lambda c: c.validation.patience is not None),
    (
        "validation.compare_base",
        "lora.rank with validation.prompts or validation.captions",
        lambda c: c.lora.rank is not None and bool(c.validation.prompts or c.validation.captions),
    ),
    (
        "validation.guidance_schedule",
        "a validation.guidance_scale other than 1",
        lambda c: c.validation.guidance_scale != 1,
    ),
    (
        "validation.guidance_rescale",
        "a validation.guidance_scale or, with validation.refine_pairs, validation.refine_guidance_scale other than 1",
        lambda c: (
            c.validation.guidance_scale != 1
            or (bool(c.validation.refine_pairs) and c.validation.refine_guidance_scale not in (None, 1))
        ),
    ),
    (
        "validation.refine_level validation.refine_guidance_scale",
        "validation.refine_pairs above 0",
        lambda c: bool(c.validation.refine_pairs),
    ),
    (
        "validation.guidance_interval",
        "validation.guidance_schedule = interval",
        lambda c: c.validation.guidance_schedule == "interval",
    ),
    ("validation.pab_timesteps", "validation.pab", lambda c: bool(c.validation.pab)),
    ("tracker.every", "tracker.name", lambda c: c.tracker.name != "none"),
    (
        "tracker.project tracker.mode tracker.timeout",
        "tracker.name = wandb",
        lambda c: c.tracker.name == "wandb",
    ),
)
"""Settings, what they need, and whether the config has it. A ``*`` stands for the rest of a name."""


def unused_settings(config: TrainConfig) -> list[str]:
    """Return a line for each setting that is not its default and has no effect."""
    changed = dict(_changed(config, TrainConfig(), ""))
    lines = []
    for names, need, has_it in RULES:
        for pattern in names.split():
            begin, star, _ = pattern.partition("*")
            found = [key for key in changed if (key.startswith(begin) if star else key == begin)]
            lines += [
                f"{key} = {changed[key]} has no effect: it is for {need}"
                for key in found
                if not has_it(config)
            ]
    return lines


def _changed(value: Any, default: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted name and value of each field of nested dataclasses that is not its default."""
    for field in fields(value):
        ours, usual = getattr(value, field.name), getattr(default, field.name)
        if is_dataclass(ours):
            yield from _changed(ours, usual, f"{prefix}{field.name}.")
        elif ours != usual:
            yield prefix + field.name, ours
