import json
from pathlib import Path

import pytest

from stdit.checkpoint_files import newest_whole, read_meta
from stdit.errors import UserError
from stdit.hashing import sealed_json
from stdit.training.checkpoint import find_checkpoint
from stdit.training.config import CheckpointConfig
from tests.training.test_checkpoint_writer import damage, folder_of, save


def test_auto_skips_broken_checkpoints(tmp_path: Path) -> None:
    checkpoints = folder_of(tmp_path, keep_last=5)
    folders = [save(checkpoints, step) for step in (1, 2, 3)]
    damage(folders[2])
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
    old, new = (save(folder_of(run), step) for step in (1, 2))
    with pytest.raises(UserError, match=r"resume = never, but .*run has checkpoints"):
        find_checkpoint("never", run)
    assert find_checkpoint(str(new), run) == (new, [])
    indirect = run / ".." / "checkpoints" / new.name
    assert find_checkpoint(str(indirect), run) == (indirect, [])
    assert find_checkpoint(str(old), other) == (old, [])
    with pytest.raises(UserError, match=r"step-00000002 already"):
        find_checkpoint(str(old), run)
    with pytest.raises(UserError, match="there is no such folder"):
        find_checkpoint(str(tmp_path / "nowhere"), run)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no meta.json"):
        find_checkpoint(str(tmp_path / "empty"), run)


def test_a_checkpoint_of_a_newer_version_is_an_error_and_not_skipped(tmp_path: Path) -> None:
    checkpoints = folder_of(tmp_path, keep_last=5)
    save(checkpoints, 1)
    newer = save(checkpoints, 2, {"versions": {"stdit": "9.0"}})
    meta = read_meta(newer)
    (newer / "meta.json").write_text(sealed_json({**meta, "format": meta["format"] + 1}))
    with pytest.raises(UserError, match=r"step-00000002 was written by a newer stdit, 9.0: its format is 4"):
        find_checkpoint("auto", tmp_path)
    del meta["format"]
    (newer / "meta.json").write_text(json.dumps(meta))  # an older one has no hash of itself
    found, reasons = find_checkpoint("auto", tmp_path)
    assert found == tmp_path / "step-00000001" and "has the format 1, of an older stdit" in reasons[0]


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="checkpoints is a file, but must be a folder: move it away"):
        find_checkpoint("auto", tmp_path / "checkpoints")


@pytest.mark.parametrize(
    "name, value", [("every", 0), ("keep_last", 0), ("keep_every", 0), ("minutes", 0), ("keep_best", -1)]
)
def test_impossible_settings(name: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"checkpoint.{name} = {value}"):
        CheckpointConfig(**{name: value})  # type: ignore[arg-type]
