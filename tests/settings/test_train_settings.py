"""Every setting of train.py changes what comes out of a tiny run, is recorded by a call, or is refused."""

import ast
import io
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train
from stdit.data.config import BucketConfig
from stdit.data.manifest.config import SourceConfig
from stdit.hashing import hash_file
from stdit.parallel.processes.watchdog import build_watchdog
from stdit.pipelines.weights import read_base
from stdit.training.config import TrainConfig, parse_train
from stdit.training.master_weights import build_master_weights
from tests.codecs.tiny import save_tiny_bert, save_tiny_vae
from tests.lora.tiny import write_random_adapter
from tests.settings.observe import (
    Change,
    Outcome,
    change_of,
    differences,
    leaves,
    outcome_of_call,
    recorded,
)
from tests.training.tiny import tiny_model, tiny_settings

ROOT = Path(__file__).parents[2]
BUCKET = "num_frames: 4, height: 8, width: 8, fps: 8"
PCA = ("--codec.name", "pca", "--codec.stride", "[1, 2, 2]", "--codec.channels", "4")
VAE = ("--codec.name", "AutoencoderKL", "--codec.path", "vaes")
SOURCE = ("--data.manifest=", "--data.sources", "[{manifest: clips.csv}]")
REGULARISATION = ("--data.regularisation.manifest", "clips.csv")
TWO_SHAPES = (
    "--data.buckets",
    "[{num_frames: 4, height: 8, width: 4}, {num_frames: 4, height: 4, width: 4}]",
)
DRY = ("--dry_run",)
ON_TWO = ("--dry_run", "sp", "--parallel.sp", "2")
"""The report of a dry run on one process, as if two were started."""
DISK = ("--data.cache", "disk")
LINEAR = ("--optimizer.schedule", "linear")
LOSS = ("--validation.loss_every", "1")
VIDEO = ("--validation.prompts", "[a]", "--validation.num_inference_steps", "1")
WANDB = ("--tracker.name", "wandb", "--tracker.mode", "offline")
SPIKES = ("--trainer.steps", "16", "--trainer.spike.factor", "1.0001", "--trainer.spike.window", "8")
SPIKES = (*SPIKES, "--optimizer.muon_lr", "1")


BEFORE = ("--output_dir", "before", "--name", "run")
"""A run of the other settings, of 3 steps."""


LORA = ("--init_from", "before/run", "--lora.rank", "2", "--optimizer.name", "adamw")


STUDENT = ("--init_from", "before/run", "--distill.guidance_scale", "[1, 2]")
FEW_STEPS = (*STUDENT, "--distill.steps", "[1, 2]", "--validation.num_inference_steps", "null")
EIGHT_STEPS = ("--validation.prompts", "[a]", "--validation.num_inference_steps", "8")


def bucket(text: str) -> list[str]:
    return ["--data.buckets", f"[{{{text}}}]"]


CHANGES = {
    "name": Change(["--name", "other"]),
    "output_dir": Change(["--output_dir", "other"]),
    "resume": Change(["--resume", "before/run/checkpoints/step-00000003"], ["--trainer.steps", "4"]),
    "resume_changed": Change(
        ["--resume_changed"],
        [*BEFORE, "--optimizer.lr", "5e-4", "--trainer.steps", "4"],
        lifts="is of another experiment",
    ),
    "init_from": Change(["--init_from", "before/run"]),
    "distill.guidance_scale": Change(["--distill.guidance_scale", "[1, 3]"], [*STUDENT]),
    "distill.steps": Change(
        ["--distill.steps", "[1, 2]"], [*STUDENT, "--validation.num_inference_steps", "null"]
    ),
    "distill.score_updates": Change(["--distill.score_updates", "1"], [*FEW_STEPS]),
    "distill.score_lr": Change(["--distill.score_lr", "1"], [*FEW_STEPS]),
    "lora.rank": Change(["--lora.rank", "3"], LORA),
    "lora.alpha": Change(["--lora.alpha", "9"], LORA),
    "lora.targets": Change(["--lora.targets", "mlp"], LORA),
    "lora.dropout": Change(["--lora.dropout", "0.5"], LORA),
    "lora.dora": Change(["--lora.dora"], LORA),
    "lora.rslora": Change(["--lora.rslora"], LORA),
    "lora.init_from": Change(["--lora.init_from", "adapter.safetensors"], LORA),
    "lora.merge": Change(["--lora.merge", "[adapter.safetensors]"], LORA),
    "lora.other_base": Change(
        ["--lora.other_base"],
        [*LORA, "--lora.merge", "[other.safetensors]"],
        lifts="was trained on the weights xxh3:0",
    ),
    "lora.base_dtype": Change(["--lora.base_dtype", "bf16"], [*LORA, "--trainer.precision", "bf16"]),
    "memory.weights": Change(["--memory.weights", "bf16_master"], ["--trainer.precision", "bf16"]),
    "memory.optimizer_state": Change(["--memory.optimizer_state", "8bit"], ["--optimizer.name", "adamw"]),
    "memory.fused_backward": Change(
        ["--memory.fused_backward"]
    ),  # which changes no numbers: see tests/training/test_saving_memory.py
    "memory.activations": Change(["--memory.activations", "recompute 1"]),
    "fit": Change(["--fit", "100"]),
    "imports": Change(["--import", "mine"]),
    "model.hidden_size": Change(["--model.hidden_size", "64"]),
    "model.num_heads": Change(["--model.num_heads", "4"]),
    "model.gate_init": Change(["--model.gate_init", "0.25"]),
    "model.blocks": Change(["--model.blocks", "T S"]),
    "model.linear_causal": Change(["--model.linear_causal"], ["--model.blocks", "T L"]),
    "model.patch_size": Change(["--model.patch_size", "[1, 2, 2]"]),
    "codec.name": Change(["--codec.name", "pca", "--codec.stride", "[1, 2, 2]", "--codec.channels", "3"]),
    "codec.path": Change(["--codec.path", "vaes/second"], VAE),
    "codec.subfolder": Change(["--codec.subfolder", "second"], VAE),
    "codec.dtype": Change(["--codec.dtype", "bf16"], VAE),
    "codec.stride": Change(["--codec.stride", "[1, 4, 4]"], PCA),
    "codec.channels": Change(["--codec.channels", "3"], PCA),
    "codec.fit_clips": Change(["--codec.fit_clips", "1"], PCA),
    "codec.tile": Change(["--codec.tile", "128"]),
    "text_encoder.name": Change(["--text_encoder.name", "minilm", "--text_encoder.path", "null"]),
    "text_encoder.path": Change(["--text_encoder.path", "berts/second"]),
    "text_encoder.subfolder": Change(
        ["--text_encoder.subfolder", "second"], ["--text_encoder.path", "berts"]
    ),
    "text_encoder.max_length": Change(["--text_encoder.max_length", "6"]),
    "text_encoder.layers": Change(["--text_encoder.layers", "[0, 1]"]),
    "flow.prediction": Change(["--flow.prediction", "sample"]),
    "flow.caption_dropout": Change(["--flow.caption_dropout", "1"]),
    "flow.conditioning": Change(["--flow.conditioning", "{head: 1.0}"]),
    "data.manifest": Change(["--data.manifest", "clips/manifest.csv"]),
    "data.root": Change(["--data.root", "elsewhere"]),
    "data.sources": Change(
        ["--data.sources", "[{manifest: clips.csv}, {manifest: clips/manifest.csv}]"], SOURCE
    ),
    "data.caption_scores": Change(["--data.caption_scores", "[motion]"], ["--text_encoder.max_length", "40"]),
    "data.regularisation.manifest": Change(REGULARISATION),
    "data.regularisation.root": Change(["--data.regularisation.root", "elsewhere"], REGULARISATION),
    "data.regularisation.share": Change(["--data.regularisation.share", "0.9"], REGULARISATION),
    "data.trigger": Change(["--data.trigger", "sks"]),
    "data.buckets": Change(bucket(f"{BUCKET}, batch_size: 3")),
    "data.allow_upscale": Change(
        ["--data.allow_upscale"],
        ["--data.buckets", f"[{{num_frames: 4, height: 16, width: 16, fps: 8}}, {{{BUCKET}}}]"],
    ),
    "data.crop": Change(["--data.crop", "random"], bucket("num_frames: 4, height: 8, width: 4, fps: 8")),
    "data.bucket_choice": Change(
        ["--data.bucket_choice", "size"],
        TWO_SHAPES,
    ),
    "data.max_crop": Change(
        ["--data.max_crop", "0.1"],
        ["--data.bucket_choice", "size", *TWO_SHAPES],
    ),
    "data.max_skipped_share": Change(
        ["--data.max_skipped_share", "0.5"],
        ["--data.manifest", "damaged.csv", "--data.max_skipped_share", "0"],
        lifts="more than data.max_skipped_share = 0",
    ),
    "data.cache_dir": Change(["--data.cache_dir", "other"], DISK),
    "data.augmented_views": Change(
        ["--data.augmented_views", "3"], [*DISK, *bucket("num_frames: 2, height: 8, width: 8")]
    ),
    "trainer.steps": Change(["--trainer.steps", "2"]),
    "trainer.device": Change(["--trainer.device", "auto"]),
    "trainer.matmul_precision": Change(["--trainer.matmul_precision", "high"]),
    "trainer.max_grad_norm": Change(["--trainer.max_grad_norm", "1e-3"]),
    "trainer.max_nonfinite_steps": Change(
        ["--trainer.max_nonfinite_steps", "9"],
        ["--optimizer.muon_lr", "1e38", "--trainer.max_nonfinite_steps", "1"],
        lifts="not finite in 1 steps",
    ),
    "trainer.spike.factor": Change(
        ["--trainer.spike.factor", "1.0001"],
        ["--trainer.steps", "16", "--trainer.spike.window", "8", "--optimizer.muon_lr", "1"],
    ),
    "trainer.spike.window": Change(["--trainer.spike.window", "200"], SPIKES),
    "trainer.spike.exclude_batches": Change(["--trainer.spike.exclude_batches", "2"], SPIKES),
    "trainer.spike.max_spikes": Change(
        ["--trainer.spike.max_spikes", "99"],
        [*SPIKES, "--trainer.spike.max_spikes", "1"],
        lifts="trainer.spike.max_spikes = 1",
    ),
    "optimizer.name": Change(["--optimizer.name", "adamw"]),
    "optimizer.betas": Change(["--optimizer.betas", "[0.5, 0.5]"]),
    "optimizer.eps": Change(["--optimizer.eps", "0.1"]),
    "optimizer.muon_momentum": Change(["--optimizer.muon_momentum", "0.5"]),
    "optimizer.decay_share": Change(["--optimizer.decay_share", "0.5"], LINEAR),
    "optimizer.final_share": Change(["--optimizer.final_share", "0.5"], LINEAR),
    "ema.decay": Change(["--ema.decay", "0"]),
    "checkpoint.minutes": Change(
        ["--checkpoint.minutes", "1e-9"], ["--checkpoint.every", "3", "--checkpoint.keep_last", "9"]
    ),
    "checkpoint.every": Change(["--checkpoint.every", "2"], ["--checkpoint.keep_last", "9"]),
    "checkpoint.keep_last": Change(["--checkpoint.keep_last", "1"]),
    "checkpoint.keep_every": Change(["--checkpoint.keep_every", "1"], ["--checkpoint.keep_last", "1"]),
    "checkpoint.keep_best": Change(["--checkpoint.keep_best", "3"], ["--checkpoint.keep_last", "1", *LOSS]),
    "validation.prompts": Change(VIDEO),
    "validation.captions": Change(["--validation.captions", "1"], ["--validation.num_inference_steps", "1"]),
    "validation.every": Change(["--validation.every", "1"], VIDEO),
    "validation.seed": Change(["--validation.seed", "1"], VIDEO),
    "validation.patience": Change(
        ["--validation.patience", "1"], [*LOSS, "--validation.min_improvement", "0.9"]
    ),
    "validation.min_improvement": Change(
        ["--validation.min_improvement", "0.9"], [*LOSS, "--validation.patience", "1"]
    ),
    "validation.compare_base": Change(["--validation.compare_base", "false"], [*VIDEO, *LORA]),
    "validation.loss_manifest": Change(["--validation.loss_manifest", "clips/manifest.csv"], LOSS),
    "validation.loss_clips": Change(["--validation.loss_clips", "1"], LOSS),
    "validation.loss_levels": Change(["--validation.loss_levels", "1"], LOSS),
    "validation.num_frames": Change(["--validation.num_frames", "3"]),
    "validation.height": Change(["--validation.height", "4", "--validation.width", "8"]),
    "validation.width": Change(["--validation.height", "8", "--validation.width", "4"]),
    "validation.num_inference_steps": Change(["--validation.num_inference_steps", "2"]),
    "validation.cache": Change(["--validation.cache", "fast"], EIGHT_STEPS),
    "validation.pab": Change(["--validation.pab", "[2, 2, 2]"], EIGHT_STEPS),
    "validation.pab_timesteps": Change(
        ["--validation.pab_timesteps", "[100, 900]"], [*EIGHT_STEPS, "--validation.pab", "[2, 2, 2]"]
    ),
    "validation.guidance_schedule": Change(["--validation.guidance_schedule", "linear"]),
    "validation.guidance_interval": Change(["--validation.guidance_interval", "[0.2, 0.4]"]),
    "tracker.name": Change(["--tracker.name", "tensorboard"]),
    "tracker.project": Change(["--tracker.project", "other"], WANDB),
    "tracker.mode": Change(["--tracker.mode", "online"], WANDB),
    "tracker.timeout": Change(["--tracker.timeout", "5"], WANDB),
    "tracker.every": Change(["--tracker.every", "1"], WANDB),
    "parallel.sp": Change(["--parallel.sp", "2"], DRY),
    "parallel.shard_parameters": Change(["--parallel.shard_parameters"]),  # a call: there is one process
    "parallel.grid": Change(["--parallel.grid", "[1, 2]"], ON_TWO),
    "parallel.memory_gib": Change(["--parallel.memory_gib", "0.01"], DRY),
    "parallel.link_gbit": Change(["--parallel.link_gbit", "1e-6"], ON_TWO),
    "parallel.latency_us": Change(["--parallel.latency_us", "1e6"], ON_TWO),
    "parallel.tflops": Change(["--parallel.tflops", "1e-6"], ON_TWO),
    "parallel.overlap_chunks": Change(["--parallel.overlap_chunks", "2"], ON_TWO),
}
INSIDE = {
    "num_frames": Change(bucket("num_frames: 2, height: 8, width: 8, fps: 8")),
    "fps": Change(
        bucket("num_frames: 2, height: 8, width: 8, fps: 4"), bucket("num_frames: 2, height: 8, width: 8")
    ),
    "height": Change(bucket("num_frames: 4, height: 4, width: 8")),
    "width": Change(bucket("num_frames: 4, height: 8, width: 4")),
    "resolution": Change(bucket("num_frames: 4, resolution: '8', aspect_ratio: '1:1'")),
    "aspect_ratio": Change(
        bucket("num_frames: 4, resolution: '8', aspect_ratio: '2:1'"),
        ["--data.allow_upscale", *bucket("num_frames: 4, resolution: '8', aspect_ratio: '1:1'")],
    ),
    "batch_size": Change(bucket(f"{BUCKET}, batch_size: 3")),
    "max_tokens": Change(bucket(f"{BUCKET}, max_tokens: 64")),
    "max_windows": Change(
        bucket("num_frames: 2, height: 8, width: 8, fps: 8, max_windows: 2"),
        bucket("num_frames: 2, height: 8, width: 8"),
    ),
    "keep_probability": Change(bucket(f"{BUCKET}, keep_probability: 0.5"), bucket(BUCKET)),
    "manifest": Change(["--data.sources", "[{manifest: clips/manifest.csv}]"], SOURCE),
    "root": Change(["--data.sources", "[{manifest: clips.csv, root: elsewhere}]"], SOURCE),
    "weight": Change(
        ["--data.sources", "[{manifest: clips/manifest.csv, weight: 2}]"],
        ["--data.manifest=", "--data.sources", "[{manifest: clips/manifest.csv}]"],
    ),
}
"""Settings of the entries of lists: of a bucket, and of a source."""
ELSEWHERE = {"memory.offload_optimizer", "parallel.heartbeat_timeout"}
"""For GPUs or several processes: see `test_settings_for_other_machines_make_their_calls`."""
MADE_BY_THE_RUN = {
    "model.in_channels": Change(["--model.in_channels", "7"]),
    "model.caption_channels": Change(["--model.caption_channels", "7"]),
    "model.model_max_length": Change(["--model.model_max_length", "7"]),
    "model.guidance_range": Change(["--model.guidance_range", "[1, 2]"]),
}
"""Settings of a model that follow from others in training, which a run says if they are set."""
CALLS: dict[str, Callable[..., Any] | None] = {
    "torch.set_num_threads": Mock(),
    "torch.set_float32_matmul_precision": Mock(),
    "stdit.training.session.keep_freed_memory": None,
    "stdit.models.stdit.STDiT.compile_blocks": Mock(),
    "stdit.models.stdit.STDiT.enable_gradient_checkpointing": None,
    "stdit.models.stdit.checkpoint": None,
    "stdit.codecs.base.VideoCodec.enable_tiling": None,
    "stdit.training.session.prepare_process": None,
    "stdit.training.trainer.shard_model": None,
    "stdit.training.trainer.FusedBackward": None,
    "stdit.parallel.processes.mesh.ParallelDims": None,
    "stdit.parallel.processes.mesh.Speeds": None,
    "stdit.training.system.runs_on_cpu": None,
    "stdit.training.session.Trainer": None,
    "stdit.training.checkpoint_writer.BackgroundWrite": None,
    "stdit.data.dataset.DataLoader": None,
}
WANDB_CALLS: dict[str, Callable[..., Any] | None] = {
    "accelerate.tracking.WandBTracker": Mock(),
    "wandb.Settings": None,
    "stdit.training.tracking.WandB.log": Mock(),
}
"""Only with wandb, which is slow to import."""
INPUTS = """clips elsewhere berts vaes before clips.csv damaged.csv other.safetensors adapter.safetensors
    mine.py""".split()
VOLATILE = ("second", "share", "memory", "time", "bytes", "mfu")
"""Parts of names in metrics.jsonl that differ from run to run."""


@pytest.fixture(scope="module")
def outcome_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[str]], Outcome]:
    folder = tmp_path_factory.mktemp("settings")
    base = tiny_settings(folder)
    rows = [f"clips/clip-{k}.mp4,a <b>Red</b> square {k},{k}" for k in range(5)]
    (folder / "clips.csv").write_text("\n".join(["path,text,motion", *rows, ""]))
    (folder / "clips" / "damaged.mp4").write_bytes(b"no video")
    damaged = [f"clips/{name}.mp4,a,4,8,8,8" for name in ("damaged", "clip-1", "clip-2")]
    (folder / "damaged.csv").write_text("\n".join(["path,text,num_frames,fps,height,width", *damaged, ""]))
    for k in range(5):
        (folder / "elsewhere" / "clips").mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "clips" / f"clip-{k}.mp4", folder / "elsewhere" / "clips" / f"clip-{4 - k}.mp4")
    for seed, name in enumerate((".", "second")):
        save_tiny_bert(folder / "berts" / name, seed)
        save_tiny_vae("AutoencoderKL", folder / "vaes" / name, seed)
    (folder / "mine.py").write_text("print('mine is imported')")
    base += ["--data.manifest", "clips.csv", "--output_dir", "outputs", "--trainer.steps", "3"]
    base += ["--model.depth", "2", "--model.gate_init", "0.5", "--checkpoint.every", "1"]
    base += ["--validation.num_inference_steps", "1"]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *base, *BEFORE])
        AcceleratorState._reset_state(True)
        assert train.main() == 0
        model = read_base("before/run", [])[0]
    write_random_adapter(folder / "other.safetensors", model, "xxh3:0")
    write_random_adapter(folder / "adapter.safetensors", model, rank=2, alpha=2.0, targets="attention")

    @cache
    def run(flags: tuple[str, ...]) -> Outcome:
        work = tmp_path_factory.mktemp("run")
        for name in INPUTS:
            copy = shutil.copytree if (folder / name).is_dir() else shutil.copy
            copy(folder / name, work / name)
        calls, printed = list[str](), io.StringIO()
        targets = CALLS | (WANDB_CALLS if "wandb" in flags else {})
        with (
            pytest.MonkeyPatch.context() as patch,
            recorded(targets, calls),
            Log() as log,
            redirect_stdout(printed),
        ):
            patch.chdir(work)
            patch.setattr(sys, "argv", ["train.py", *base, *flags])
            AcceleratorState._reset_state(True)
            found = outcome_of_call(lambda: {"code": str(train.main())})
        shown = re.sub("'[0-9a-f]{8}'", "ID", "\n".join(calls))  # of a run in wandb, drawn at random
        said = {"calls": shown, "log": str(log), "printed": printed.getvalue(), "unused": str(log.unused)}
        texts = {name: str(text).replace(str(work), "WORK") for name, text in {**found, **said}.items()}
        return {**texts, **_files(work)}

    return run


class Log(logging.Handler):
    """The warnings of stdit; those of settings without an effect stand apart, since they are no effect."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self.unused: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        (self.unused if " has no effect: " in line else self.lines).append(line)

    def __enter__(self) -> "Log":
        logging.getLogger("stdit").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("stdit").removeHandler(self)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def sizes(tensor: torch.Tensor) -> list[float]:
    """Return numbers that change when the entries of a tensor do."""
    values = tensor.double().flatten()
    return [float(values.numel()), float(values.abs().sum()), float(values.square().cumsum(0).sum())]


def _files(work: Path) -> Outcome:
    """Return the files of a run: sizes of weights, numbers of metrics, and the settings of the exported pipeline.

    Files that repeat the settings themselves (config.yaml, meta.json) count by name only.
    """
    found: Outcome = {}
    for file in sorted(path for path in work.rglob("*") if path.is_file()):
        name = str(file.relative_to(work))
        if name.partition("/")[0] in INPUTS:
            continue
        if "events.out" in name or name.startswith("outputs/tiny/wandb"):
            name = name.rpartition("/")[0]
        content: str | list[float] = ""
        if file.suffix == ".safetensors":
            content = [value for tensor in load_file(file).values() for value in sizes(tensor)]
        if file.suffix == ".mp4" or name.endswith("model_index.json"):
            content = hash_file(file)
        if file.name == "metrics.jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            values = [(k, v) for line in lines for k, v in line.items() if not any(w in k for w in VOLATILE)]
            found[f"{name}: names"] = str([(k, v if isinstance(v, str | None) else "") for k, v in values])
            content = [float(v) for _, v in values if isinstance(v, int | float)]
        found[name] = content
    return found


def check_effect(change: Change, outcome_of: Callable[[Sequence[str]], Outcome]) -> None:
    """Fail unless a change of a setting has an effect, which is no error, but may lift one."""
    before, after = outcome_of(tuple(change.beside)), outcome_of((*change.beside, *change.flags))
    refusal = before.get("error", "")
    assert change.lifts in refusal if change.lifts else not refusal, f"without it: {refusal}"
    assert "error" not in after, f"refused: {after['error']}"
    changed = set(differences(before, after)) - {"unused"}
    assert changed, f"ignored: {' '.join(change.flags)} changes nothing"


@pytest.mark.slow
def test_every_setting_of_train_changes_something(outcome_of: Callable[[Sequence[str]], Outcome]) -> None:
    """One test, so that runs with equal settings are shared."""
    ignored = []
    for beside in ((), WANDB, DRY, ON_TWO):
        first, again = outcome_of(beside), outcome_of((*beside, "--trainer.steps", "3"))
        if differences(first, again):
            ignored.append(f"the same run differs from itself: {differences(first, again)}")
    for key, hint, default in leaves(TrainConfig):
        if key in ELSEWHERE or key in MADE_BY_THE_RUN:
            continue
        try:
            check_effect(change_of(key, hint, default, CHANGES), outcome_of)
        except AssertionError as error:
            ignored.append(f"{key}: {str(error).splitlines()[0]}")
    for key, change in MADE_BY_THE_RUN.items():
        after = outcome_of(tuple(change.flags))
        if f"{key} = " not in str(after.get("error", after["unused"])):
            ignored.append(f"{key} is made by the run, which does not say so")
    inside = {field: kind for kind in (BucketConfig, SourceConfig) for field, _, _ in leaves(kind)}
    assert inside.keys() == INSIDE.keys()
    for key, change in INSIDE.items():
        try:
            check_effect(change, outcome_of)
        except AssertionError as error:
            ignored.append(f"{inside[key].__name__}.{key}: {str(error).splitlines()[0]}")
    assert not ignored, "\n".join(ignored)


def test_settings_for_other_machines_make_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU (here meta) the optimizer's weights go to the CPU; the watchdog of two processes has its limit."""
    masters, watchdog = Mock(), Mock()
    monkeypatch.setattr("stdit.training.master_weights.MasterWeights", masters)
    config = parse_train(
        ["--data.manifest", "clips.csv", "--memory.offload_optimizer", "--parallel.heartbeat_timeout", "77"]
    )
    build_master_weights(model := tiny_model().to("meta"), config.memory)
    masters.assert_called_once_with(model, torch.float32, torch.device("cpu"))
    monkeypatch.setattr("stdit.parallel.processes.watchdog.RankWatchdog", watchdog)
    monkeypatch.setattr("stdit.parallel.processes.watchdog.TCPStore", Mock())
    monkeypatch.setattr("stdit.parallel.processes.watchdog.PrefixStore", Mock())
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    build_watchdog(MagicMock(world_size=2), config.parallel)
    assert watchdog.call_args.kwargs["heartbeat_timeout"] == 77


def test_every_setting_is_read_outside_of_its_declaration() -> None:
    """A quick check for settings that nothing reads at all."""
    read: set[str] = set()
    for path in sorted((ROOT / "stdit").rglob("*.py")):
        tree: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
        parts = [tree]
        if path.name == "config.py":
            functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
            parts = [one for one in functions if one.name not in ("__post_init__", "validate", "check")]
        for node in (node for part in parts for node in ast.walk(part)):
            read |= {
                getattr(node, name)
                for name in ("attr", "id", "arg")
                if isinstance(getattr(node, name, 0), str)
            }
            read |= {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()
    unread = {key.rpartition(".")[2] for key, _, _ in leaves(TrainConfig)} - read
    assert not unread, unread
