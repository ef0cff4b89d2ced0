import pickle
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stdit.checkpoint_files import verify, write_manifest
from stdit.errors import UserError
from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.processes.storage import PLACEMENT, StoredTensors
from stdit.training import checkpoint_writer
from stdit.training.checkpoint import find_checkpoint
from stdit.training.checkpoint_writer import CheckpointWriter, HostCopy, steps_to_keep
from stdit.training.config import CheckpointConfig

WEIGHTS = "model/diffusion_pytorch_model.safetensors"


def state() -> dict[str, dict[str, Tensor]]:
    return {"model": {"weight": torch.arange(6.0).view(2, 3)}, "ema": {}, "optimizer": {}}


def folder_of(path: Path, **settings: Any) -> CheckpointWriter:
    return CheckpointWriter(path, CheckpointConfig(**settings), Mesh())


def save(checkpoints: CheckpointWriter, step: int, meta: dict[str, Any] | None = None) -> Path:
    return checkpoints.save(step, state(), meta or {}, at_once=True)


def damage(folder: Path) -> None:
    """Flip a bit of the weights."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def weight(folder: Path) -> Tensor:
    read = {"weight": torch.empty(2, 3)}
    StoredTensors(folder / "model").read_into(read)
    return read["weight"]


def test_keep_last_and_keep_every(tmp_path: Path) -> None:
    checkpoints = folder_of(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 8):
        folder = save(checkpoints, step)
        assert verify(folder)["step"] == step
    assert names(tmp_path) == ["step-00000004", "step-00000006", "step-00000007"]


def test_keep_best_follows_the_validation_loss(tmp_path: Path) -> None:
    checkpoints = folder_of(tmp_path, keep_last=1, keep_best=2)
    losses = {1: 0.5, 2: 0.3, 3: 0.4, 4: float("nan"), 5: 0.6}
    for step, loss in losses.items():
        save(checkpoints, step)
        checkpoints.record_loss(step, loss)
    again = folder_of(tmp_path, keep_last=1, keep_best=2)  # after a restart
    save(again, 6)
    folders = ["step-00000002", "step-00000003", "step-00000006"]
    assert names(tmp_path) == [*folders, "validation_loss.json"]
    (tmp_path / "validation_loss.json").write_text("[")
    with pytest.raises(UserError, match="validation_loss.json holds no losses by step"):
        folder_of(tmp_path)


def test_steps_to_keep() -> None:
    config = CheckpointConfig(keep_last=2, keep_every=4, keep_best=1)
    assert steps_to_keep(range(1, 11), config, {}) == {4, 8, 9, 10}
    assert steps_to_keep(range(1, 11), config, {3: 1.0, 7: 1.0, 99: 0.0}) == {3, 4, 8, 9, 10}
    assert steps_to_keep([], config, {}) == set()


def test_the_newest_whole_checkpoint_always_stays(tmp_path: Path) -> None:
    checkpoints = folder_of(tmp_path, keep_last=9)
    folders = [save(checkpoints, step) for step in (1, 2, 3, 4)]
    for folder in folders[2:]:
        damage(folder)
    checkpoints.config.keep_last = 1
    checkpoints.prune()
    assert names(tmp_path) == ["step-00000002", "step-00000004"]
    assert find_checkpoint("auto", tmp_path)[0] == folders[1]
    save(checkpoints, 5)
    assert names(tmp_path) == ["step-00000005"]


def test_what_an_interrupted_save_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "step-00000003.tmp").mkdir(parents=True)
    (tmp_path / "step-00000003.tmp" / "half").touch()
    assert find_checkpoint("auto", tmp_path) == (None, [])
    folder_of(tmp_path)
    assert names(tmp_path) == []


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the disk full as soon as the files are written."""
    original = checkpoint_writer.write_chunks

    def refuse(folder: Path, *args: Any) -> list[Path]:
        files = original(folder, *args)
        if folder.name == "step-00000002.tmp":
            raise OSError(28, "No space left on device")
        return files

    monkeypatch.setattr(checkpoint_writer, "write_chunks", refuse)


def test_a_full_disk_leaves_older_checkpoints_unchanged(tmp_path: Path, refused: None) -> None:
    checkpoints = folder_of(tmp_path, keep_last=1)
    save(checkpoints, 1)
    with pytest.raises(UserError, match=r"step-00000002 could not be written .*No space.*unchanged"):
        save(checkpoints, 2)
    assert names(tmp_path) == ["step-00000001"]
    verify(tmp_path / "step-00000001")


def test_a_broken_checkpoint_of_the_same_step_is_moved_aside(tmp_path: Path) -> None:
    checkpoints = folder_of(tmp_path)
    folder = save(checkpoints, 1)
    inode = folder.stat().st_ino
    assert save(checkpoints, 1) == folder and folder.stat().st_ino == inode  # whole already
    damage(folder)
    save(checkpoints, 1)
    assert names(tmp_path) == ["step-00000001", "step-00000001.broken"]
    verify(folder)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Block writing until the returned function is called."""
    go, original = Event(), checkpoint_writer.write_chunks

    def slow(*args: Any) -> list[Path]:
        assert go.wait(30)
        return original(*args)

    monkeypatch.setattr(checkpoint_writer, "write_chunks", slow)
    return go.set


def test_training_continues_while_a_copy_is_written(tmp_path: Path, held: Callable[[], None]) -> None:
    checkpoints, live = folder_of(tmp_path), state()
    folder = checkpoints.save(1, live, {})
    live["model"]["weight"].mul_(-1)  # a step
    assert not folder.exists() and find_checkpoint("auto", tmp_path) == (None, [])
    held()
    checkpoints.wait()
    verify(folder)
    assert torch.equal(weight(folder), state()["model"]["weight"])
    assert set(checkpoints.seconds) == {"checkpoint_seconds", "checkpoint_wait_seconds"}


def test_a_second_save_waits_for_the_first(
    tmp_path: Path, held: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, live = folder_of(tmp_path), state()
    first = checkpoints.save(1, live, {})
    copied: list[bool] = []
    original = HostCopy.of
    monkeypatch.setattr(
        HostCopy, "of", lambda self, pieces: copied.append(first.exists()) or original(self, pieces)
    )
    held()
    live["model"]["weight"].mul_(2)
    second = checkpoints.save(2, live, {})
    assert copied == [True]  # the one copy is used again only when it is on the disk
    assert checkpoints.seconds["checkpoint_wait_seconds"] <= checkpoints.seconds["checkpoint_seconds"]
    checkpoints.wait()
    assert torch.equal(weight(first), state()["model"]["weight"])
    assert torch.equal(weight(second), 2 * weight(first))


def test_the_error_of_a_thread_is_raised_when_waiting_for_it(
    tmp_path: Path, refused: None, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = folder_of(tmp_path)
    checkpoints.save(1, state(), {})
    checkpoints.save(2, state(), {})
    assert checkpoints.writing is not None and checkpoints.writing.ended(30)
    assert checkpoints.failed
    with pytest.raises(UserError, match=r"step-00000002 could not be written .*No space"):
        checkpoints.save(3, state(), {})
    assert not checkpoints.failed and names(tmp_path) == ["step-00000001"]
    checkpoints.save(2, state(), {})
    checkpoints.wait_at_exit()
    assert "step-00000002 could not be written" in capsys.readouterr().err


def test_a_state_without_tensors_is_read_as_one(tmp_path: Path) -> None:
    """The optimizer has none if all steps were skipped."""
    folder = save(folder_of(tmp_path), 1)
    assert StoredTensors(folder / "optimizer").tensors() == {}


class Planted:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_in_a_checkpoint_is_refused_and_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    harmful = pickle.dumps(Planted(mark))
    folder = save(folder_of(tmp_path / "checkpoints"), 1)
    for name in (".metadata", "model/.metadata"):  # where torch's own format has one
        (folder / name).write_bytes(harmful)
    assert torch.equal(weight(folder), state()["model"]["weight"])
    (folder / WEIGHTS).write_bytes(harmful)
    with pytest.raises(UserError, match="bytes, but .* were written"):
        verify(folder)
    (folder / "meta.json").unlink()
    write_manifest(folder, {"step": 1})  # as if it had been written so
    verify(folder)
    with pytest.raises(UserError, match=r"model cannot be read \(SafetensorError"):
        weight(folder)
    assert not mark.exists()
    pickle.loads(harmful)
    assert mark.exists()


@pytest.mark.parametrize(
    "placement, message",
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"weight": {"saved_offsets": [1, 0]}}', "do not make up a full tensor"),
        ('{"weight": {"saved_offsets": [-2, 0]}}', "do not make up a full tensor"),
        ('{"weight": {"saved_offsets": [0]}}', "do not make up a full tensor"),
        ('{"weight": {"saved_offsets": ["a", 0]}}', "cannot be read"),
        ('{"weight": {}}', "cannot be read"),
        ('{"other": {"saved_offsets": [0, 0]}}', "cannot be read"),
    ],
)
def test_a_header_with_an_invalid_placement_is_refused(tmp_path: Path, placement: str, message: str) -> None:
    save_file({"weight": torch.zeros(2, 3)}, tmp_path / "a.safetensors", metadata={PLACEMENT: placement})
    with pytest.raises(UserError, match=message):
        StoredTensors(tmp_path)


def test_tensors_of_another_model(tmp_path: Path) -> None:
    folder = save(folder_of(tmp_path), 1)
    for other in ({"weight": torch.empty(3, 2)}, {"weights": torch.empty(2, 3)}, {}):
        with pytest.raises(
            UserError, match=r"model is not of this model: [12] tensors differ, such as weights?, "
        ):
            StoredTensors(folder / "model").read_into(other)
    with pytest.raises(UserError, match="it has no .safetensors file"):
        StoredTensors(tmp_path)
