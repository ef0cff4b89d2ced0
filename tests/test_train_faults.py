"""train.py when its folder vanishes, the clock jumps, wandb cannot be reached, or a checkpoint is damaged."""

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from stdit.checkpoint_files import FORMAT, META, newest_whole
from stdit.cli import run as run_main
from stdit.data.batch import EncodedBatch
from stdit.hashing import read_sealed, sealed_json
from stdit.parallel.processes.storage import STEMS
from stdit.training.sampler import Sampler
from stdit.training.trainer import Trainer
from tests.test_train import Settings, do, metrics, numbers, same_state, settings  # noqa: F401
from tests.training.tiny import tiny_settings


def before_step(monkeypatch: pytest.MonkeyPatch, happens: dict[int, Callable[[], object]]) -> None:
    """Call functions before steps of the run are computed, once each."""
    original = Trainer.step

    def stepping(self: Trainer, batch: EncodedBatch) -> dict[str, Any]:
        happens.pop(batch.step, lambda: None)()
        return original(self, batch)

    monkeypatch.setattr(Trainer, "step", stepping)


def checkpoint_is_written() -> None:
    """Wait for the checkpoint that is being written in the background."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(60)


def ended(argv: list[str]) -> int:
    """Run train.py in this process and return its exit code."""
    with pytest.raises(SystemExit) as end:
        run_main(lambda: do(argv))
    return int(end.value.code or 0)


def mounted(*command: str) -> None:
    """Run a command of mount. Skips the test where this is not allowed."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"{' '.join(command)}: {result.stderr.strip()}")


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only: by its mode, or for root, who may write anyway, by a mount."""
    if os.geteuid():
        folders = [path for path in (folder, *folder.rglob("*")) if path.is_dir()]
        for path in folders:
            path.chmod(0o555)
        yield
        for path in folders:
            path.chmod(0o755)
        return
    mounted("mount", "--bind", str(folder), str(folder))
    try:
        mounted("mount", "-o", "remount,bind,ro", str(folder))
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def check_one_error(said: str, run: Path, words: str) -> None:
    """Check that stderr has one error, in one line, that names the run folder."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and str(run) in errors[0] and words in errors[0], said
    assert "check that the folder exists and is writable" in errors[0] and "Traceback" not in said


@pytest.mark.parametrize("how", ["removed", "moved"])
def test_a_run_folder_that_vanishes_ends_the_run_with_an_error(
    settings: Settings,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    how: str,
) -> None:
    run, away = tmp_path / "outputs" / "tiny", tmp_path / "away"
    argv = settings()

    def goes() -> None:
        run.rename(away)
        if how == "removed":
            shutil.rmtree(away)

    with monkeypatch.context() as patch:
        before_step(patch, {4: goes})
        assert ended(argv) == 2
    check_one_error(capfd.readouterr().err, run, "removed or moved during the run")
    assert not run.exists(), "nothing is left where it was"
    if how == "moved":
        found, passed_over = newest_whole(away / "checkpoints")
        assert found is not None and not passed_over, "that of step 4 may be whole, that of step 2 is"
        away.rename(run)
    assert do(argv) == 0
    assert [line["step"] for line in metrics(run)] == list(range(6))


def test_a_folder_that_vanishes_after_the_last_step_is_not_recreated(
    settings: Settings,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run, original = (
        tmp_path / "outputs" / "tiny",
        {name: getattr(Sampler, name) for name in ("validate", "export")},
    )
    shown = {"validation__prompts": '["a red square"]', "validation__num_inference_steps": 1}
    for name, words in {"validate": "samples", "export": "pipeline"}.items():

        def vanishing(self: Sampler, step: int, name: str = name) -> None:
            shutil.rmtree(run)
            original[name](self, step)

        with monkeypatch.context() as patch:
            patch.setattr(Sampler, name, vanishing)
            assert ended(settings(trainer__steps=1, **shown)) == 2
        check_one_error(capfd.readouterr().err, run, words)
        assert not run.exists()


def test_a_run_folder_that_becomes_read_only_ends_the_run_with_an_error(
    settings: Settings,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "outputs" / "tiny"
    with ExitStack() as stack, monkeypatch.context() as patch:

        def goes() -> None:
            checkpoint_is_written()
            stack.enter_context(read_only(run))

        before_step(patch, {3: goes})
        assert ended(settings()) == 2
        check_one_error(capfd.readouterr().err, run, "step-00000004 could not be written")
        assert ended(settings()) == 2, "nor can it resume"
        said = capfd.readouterr().err
        assert said.count("error: ") == 1 and f"{run} cannot be written" in said and "Traceback" not in said
    found, passed_over = newest_whole(run / "checkpoints")
    assert found == run / "checkpoints" / "step-00000002" and not passed_over
    assert do(settings()) == 0
    assert [line["step"] for line in metrics(run)] == list(range(6))


def test_a_disk_that_turns_read_only_under_open_files_ends_the_run(
    settings: Settings,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As ext4 does after an error of the disk: files that are open for writing fail, too."""
    disk, image, run = tmp_path / "outputs", tmp_path / "image", tmp_path / "outputs" / "tiny"
    if os.geteuid() or not shutil.which("mkfs.ext4"):
        pytest.skip("needs root, to mount a file system, and mkfs.ext4")
    disk.mkdir()
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    mounted("mount", "-o", "loop", str(image), str(disk))
    try:

        def goes() -> None:
            checkpoint_is_written()
            mounted("mount", "-o", "remount,abort", str(disk))

        before_step(monkeypatch, {3: goes})
        assert ended(settings()) == 2
        said = capfd.readouterr().err
        check_one_error(said, run, "metrics.jsonl could not be written")
        assert newest_whole(run / "checkpoints")[0] == run / "checkpoints" / "step-00000002"
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_clock_that_jumps_changes_nothing(
    settings: Settings,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward by a year, then back to an hour ago: the same losses, durations, and steps with a checkpoint."""
    now, jumped, looked = time.time, [0.0], [0]

    def shifted() -> float:
        looked[0] += 1
        return now() + jumped[0]

    def jump(seconds: float) -> Callable[[], None]:
        return lambda: jumped.__setitem__(0, seconds)

    flags = {"checkpoint__every": 100, "checkpoint__keep_last": 9}
    assert do(settings(name="straight", **flags)) == 0
    outputs = tmp_path / "outputs"
    for name, minutes, steps in (("seldom", 30, [6]), ("often", 1e-6, [1, 2, 3, 4, 5, 6])):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", shifted)
            patch.setattr(time, "time_ns", lambda: int(shifted() * 1e9))
            before_step(patch, {2: jump(365 * 86400.0), 4: jump(-3600.0)})
            begin = time.perf_counter()
            assert do(settings(name=name, checkpoint__minutes=minutes, **flags)) == 0
            took = time.perf_counter() - begin
        jumped[0] = 0.0
        run = outputs / name
        folders = sorted((run / "checkpoints").iterdir())
        assert [folder.name for folder in folders] == [f"step-{step:08d}" for step in steps]
        assert numbers(run) == numbers(outputs / "straight")
        assert same_state(folders[-1], outputs / "straight" / "checkpoints" / "step-00000006")
        for line in metrics(run):
            seconds = [value for key, value in line.items() if key.endswith("seconds")]
            assert len(seconds) >= 2 and all(0 <= value < took for value in seconds), line
    assert looked[0], "somebody asked the clock that jumps"


@pytest.mark.parametrize("listens", [False, True], ids=["refuses", "never answers"])
def test_unreachable_wandb_is_reported_once_and_training_completes(
    settings: Settings,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    listens: bool,
) -> None:
    wandb = pytest.importorskip("wandb")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
            monkeypatch.setenv(name, str(tmp_path / "home"))
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        wandb.teardown()  # of earlier tests, which had another address
        assert do(settings(tracker__name="wandb", tracker__timeout=1, tracker__every=1)) == 0
        wandb.teardown()  # waits until everything is sent, as at the end of a process
    said = "".join(capfd.readouterr())
    assert said.count("wandb cannot be reached") == 1 and "Traceback" not in said
    assert said.count("warning: ") == 0 and "0123456789" * 4 not in said
    run = tmp_path / "outputs" / "tiny"
    assert [line["step"] for line in metrics(run)] == list(range(6))
    (written,) = run.glob("wandb/offline-run-*/*.wandb")
    assert b"train/loss" in written.read_bytes(), "for wandb sync"


def flip(folder: Path) -> None:
    file = folder / "ema" / "ema.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(folder: Path) -> None:
    file = folder / "optimizer" / f"{STEMS['optimizer']}.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def remove(folder: Path) -> None:
    (folder / "model" / f"{STEMS['model']}.safetensors").unlink()


def edit(**changes: Any) -> Callable[[Path], None]:
    """Return a function that changes the manifest of a checkpoint."""

    def change(folder: Path) -> None:
        meta = read_sealed(folder / META)
        for key, value in changes.items():
            meta[key] = {**meta[key], **value} if isinstance(value, dict) else value
        (folder / META).write_text(sealed_json(meta))

    return change


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Settings of a run of 6 steps, and its folder, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    argv = tiny_settings(folder)
    assert do([*argv, "--trainer.steps", "4"]) == 0
    assert do([*argv, "--name", "straight"]) == 0
    return argv, folder / "outputs" / "tiny"


@pytest.mark.parametrize(
    "damage, words",
    [
        (truncate, "bytes, but"),
        (flip, "ema.safetensors has changed"),
        (remove, "diffusion_pytorch_model.safetensors is missing"),
        (lambda folder: (folder / META).unlink(), "has no meta.json"),
    ],
    ids=["truncated", "flipped", "missing", "unfinished"],
)
def test_training_skips_a_damaged_checkpoint_with_the_same_result(
    trained: tuple[list[str], Path],
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    damage: Callable[[Path], None],
    words: str,
) -> None:
    argv, run = trained
    name = request.node.callspec.id
    copy = shutil.copytree(run, run.with_name(name))
    damage(copy / "checkpoints" / "step-00000004")
    assert do([*argv, "--name", name]) == 0
    said = capfd.readouterr().out
    passed_over = [line for line in said.splitlines() if line.startswith("checkpoint skipped: ")]
    assert len(passed_over) == 1 and "step-00000004" in passed_over[0] and words in passed_over[0]
    straight = run.with_name("straight")
    assert numbers(copy) == numbers(straight)
    assert same_state(*(folder / "checkpoints" / "step-00000006" for folder in (copy, straight)))


@pytest.mark.parametrize(
    "change, words",
    [
        (
            edit(experiment={"model.depth": 2}),
            "cannot be resumed with model.depth 2 -> 1 (its weights are of another architecture)",
        ),
        (edit(format=FORMAT + 1, versions={"stdit": "9.0"}), "was written by a newer stdit, 9.0"),
    ],
    ids=["other", "newer"],
)
def test_training_does_not_start_from_a_checkpoint_that_is_not_its_own(
    trained: tuple[list[str], Path],
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    change: Callable[[Path], None],
    words: str,
) -> None:
    argv, run = trained
    name = request.node.callspec.id
    copy = shutil.copytree(run, run.with_name(name))
    change(copy / "checkpoints" / "step-00000004")
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    assert ended([*argv, "--name", name]) == 2
    said = capfd.readouterr().err
    assert said.count("error: ") == 1 and words in said and "Traceback" not in said
    assert {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()} == before
