import json
from pathlib import Path

import pytest

from stdit.checkpoint_files import newest_whole, verify
from stdit.errors import UserError
from stdit.training.checkpoint import CheckpointConfig, Checkpoints, check_same_experiment, find_checkpoint


def write(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_bytes(b"weights")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_save_keeps_the_last_and_every_so_many(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=2, keep_every=4))
    for step in range(1, 8):
        folder = checkpoints.save(step, write, {"experiment": {}})
        assert verify(folder)["step"] == step
    assert names(tmp_path) == ["step-00000004", "step-00000006", "step-00000007"]


def test_what_an_interrupted_save_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "step-00000003.tmp").mkdir(parents=True)
    (tmp_path / "step-00000003.tmp" / "half").touch()
    assert find_checkpoint("auto", tmp_path) == (None, [])
    Checkpoints(tmp_path, CheckpointConfig())
    assert names(tmp_path) == []


def test_a_refusing_disk_leaves_older_checkpoints_as_they_were(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=1))
    checkpoints.save(1, write, {})

    def refuse(folder: Path) -> None:
        write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"step-00000002 could not be written .*No space.*as it was"):
        checkpoints.save(2, refuse, {})
    assert names(tmp_path) == ["step-00000001"]
    verify(tmp_path / "step-00000001")


def test_a_broken_checkpoint_of_the_same_step_is_moved_aside(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, write, {})
    assert (
        checkpoints.save(1, lambda folder: pytest.fail("is whole already"), {}) == tmp_path / "step-00000001"
    )
    (tmp_path / "step-00000001" / "model" / "weights").write_bytes(b"Weights")
    checkpoints.save(1, write, {})
    assert names(tmp_path) == ["step-00000001", "step-00000001.broken"]
    verify(tmp_path / "step-00000001")


def test_auto_passes_over_broken_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=5))
    folders = [checkpoints.save(step, write, {}) for step in (1, 2, 3)]
    (folders[2] / "model" / "weights").write_bytes(b"")
    found, reasons = find_checkpoint("auto", tmp_path)
    assert found == folders[1] and len(reasons) == 1 and "step-00000003" in reasons[0]
    for folder in folders:
        (folder / "meta.json").unlink()
    with pytest.raises(UserError, match=r"none is whole"):
        find_checkpoint("auto", tmp_path)
    assert newest_whole(tmp_path)[0] is None


def test_never_and_paths(tmp_path: Path) -> None:
    run, other = tmp_path / "run" / "checkpoints", tmp_path / "other" / "checkpoints"
    assert find_checkpoint("never", run) == (None, [])
    old, new = (Checkpoints(run, CheckpointConfig()).save(step, write, {}) for step in (1, 2))
    with pytest.raises(UserError, match=r"resume = never, but .*run has checkpoints"):
        find_checkpoint("never", run)
    assert find_checkpoint(str(new), run) == (new, [])
    indirect = run / ".." / "checkpoints" / new.name
    assert find_checkpoint(str(indirect), run) == (indirect, [])
    assert find_checkpoint(str(old), other) == (old, [])
    with pytest.raises(UserError, match=r"step-00000002 already"):
        find_checkpoint(str(old), run)
    with pytest.raises(UserError, match="not a folder"):
        find_checkpoint(str(tmp_path / "nowhere"), run)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no meta.json"):
        find_checkpoint(str(tmp_path / "empty"), run)


def test_another_experiment_is_named(tmp_path: Path) -> None:
    meta = {"experiment": {"model.depth": 2, "seed": 0, "gone": 1}, "nonfinite_in_a_row": 0}
    folder = Checkpoints(tmp_path, CheckpointConfig()).save(1, write, meta)
    assert check_same_experiment(folder, {"model.depth": 2, "new": 3})["step"] == 1
    with pytest.raises(UserError, match=r"model.depth was 2, is 3; seed was 0, is 1"):
        check_same_experiment(folder, {"model.depth": 3, "seed": 1})


@pytest.mark.parametrize("key", ["step", "experiment", "nonfinite_in_a_row"])
def test_a_manifest_that_lacks_something_is_named(tmp_path: Path, key: str) -> None:
    folder = Checkpoints(tmp_path, CheckpointConfig()).save(
        1, write, {"experiment": {}, "nonfinite_in_a_row": 0}
    )
    meta = json.loads((folder / "meta.json").read_text())
    del meta[key]
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=f"meta.json has no {key} that can be read: use another"):
        check_same_experiment(folder, {})


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="checkpoints is a file, in the place of a folder: move it away"):
        find_checkpoint("auto", tmp_path / "checkpoints")


@pytest.mark.parametrize("settings", [{"every": 0}, {"keep_last": 0}, {"keep_every": 0}])
def test_impossible_settings(settings: dict[str, int]) -> None:
    with pytest.raises(UserError, match=rf"checkpoint.{next(iter(settings))} = 0"):
        CheckpointConfig(**settings)
