from pathlib import Path
from typing import Any

import pytest

from stdit.checkpoint_files import read_meta
from stdit.data.assignment import assign_clips
from stdit.data.buckets import Bucket
from stdit.data.clip_list import ClipList
from stdit.data.decoding.media import Media
from stdit.data.manifest.clips import Clip
from stdit.errors import UserError
from stdit.hashing import sealed_json
from stdit.training.lineage import CLIP_LIST, check_can_resume, lineage, resume, unneeded
from tests.training.test_checkpoint_writer import folder_of, save

STATE = {"nonfinite_in_a_row": 0, "batch_splits": 1}
CLIPS = ClipList.of(assign_clips([Clip(Media("a.mp4"), "a", 8, 8.0, 8, 8)], [Bucket(4, 8, 8, 8.0)]))


def checkpoint(folder: Path, experiment: dict[str, Any], **meta: Any) -> Path:
    return save(folder_of(folder), 5, {"experiment": experiment, **STATE, **meta})


def test_what_cannot_change_is_named_with_the_reason(tmp_path: Path) -> None:
    saved = {"model.depth": 2, "seed": 0, "gone": 1, "codec's weights": "a", "text_encoder.name": "t5"}
    saved |= {
        "flow.prediction": "velocity",
        "optimizer.name": "adamw",
        "codec.name": "tiny",
        "codec.tile": 256,
    }
    folder = checkpoint(tmp_path, saved)
    assert check_can_resume(folder, {"model.depth": 2, "new": 3, "seed": 1, "codec.tile": 128})["step"] == 5
    for key, message in {
        "model.depth": "model.depth 2 -> 3 (its weights are of another architecture)",
        "codec.name": "codec.name tiny -> 3 (its weights were trained on the latents of another codec)",
        "codec's weights": "codec's weights a -> 3 (its weights were trained on the latents of another codec)",
        "text_encoder.name": "text_encoder.name t5 -> 3 (its weights were trained with another text encoder)",
        "flow.prediction": "flow.prediction velocity -> 3 (the output of its weights has another meaning)",
        "optimizer.name": "optimizer.name adamw -> 3 (its state is that of another optimizer)",
    }.items():
        with pytest.raises(UserError) as refused:
            check_can_resume(folder, {**saved, "seed": 4, key: 3})
        assert f"cannot be resumed with {message}. Go back to its settings" in str(refused.value)
        assert f"--init_from {folder}" in str(refused.value)


def test_older_names_of_settings_are_known(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {"model.block_order": "paired", "seed": 0})
    check_can_resume(folder, {"model.blocks": "S T T S", "seed": 0})
    with pytest.raises(UserError, match="model.blocks S T T S -> S T "):
        check_can_resume(folder, {"model.blocks": "S T", "seed": 0})


@pytest.mark.parametrize("key", ["step", "experiment", "nonfinite_in_a_row", "batch_splits"])
def test_a_missing_key_of_the_manifest_is_named(tmp_path: Path, key: str) -> None:
    folder = checkpoint(tmp_path, {})
    meta = read_meta(folder)
    del meta[key]
    (folder / "meta.json").write_text(sealed_json(meta))
    with pytest.raises(UserError, match=f"meta.json has no valid {key}: use another"):
        check_can_resume(folder, {})


def test_changes_are_told_entry_by_entry(tmp_path: Path) -> None:
    buckets = [{"height": 8, "batch_size": 2}, {"height": 16, "batch_size": 2}]
    saved = {"data.buckets": buckets, "flow.conditioning": {"first": 0.3}, "data.crop": "center"}
    saved |= {"optimizer.lr": 1e-4, "optimizer.betas": [0.9, 0.99], "clips": "old"}
    folder = checkpoint(tmp_path, saved)
    now = {
        "data.buckets": [buckets[0], {"height": 16, "batch_size": 4}],
        "flow.conditioning": {"first": 0.1, "last": 0.2},
        "data.crop": "random",
        "optimizer.lr": 5e-5,
        "optimizer.betas": [0.9, 0.95],
        "clips": "new",
    }
    words = [
        f"other clips ({folder / CLIP_LIST} is missing, which would tell the difference)",
        "data.buckets[1].batch_size 2 -> 4",
        "flow.conditioning.first 0.3 -> 0.1",
        "flow.conditioning.last null -> 0.2",
        "data.crop center -> random",
        "optimizer.lr 0.0001 -> 5e-05",
        "optimizer.betas [0.9, 0.99] -> [0.9, 0.95]",
    ]
    with pytest.raises(UserError) as refused:
        resume(folder, now, CLIPS, allowed=False)
    assert f"is of another experiment: {'; '.join(words)}. Add --resume_changed" in str(refused.value)
    assert resume(folder, now, CLIPS, allowed=True).changes == words
    assert resume(folder, saved, CLIPS, allowed=False).changes == []


def test_the_lineage_grows_by_each_change(tmp_path: Path) -> None:
    first = resume(
        checkpoint(tmp_path / "a", {"seed": 0, "clips": "x"}), {"seed": 1, "clips": "x"}, CLIPS, True
    )
    once = lineage(first, {"seed": 1, "clips": "x"})
    assert [(entry["step"], entry["changes"]) for entry in once] == [(5, ["seed 0 -> 1"])]
    folder = checkpoint(tmp_path / "b", {"seed": 1, "clips": "x"}, lineage=once)
    assert lineage(resume(folder, {"seed": 1, "clips": "x"}, CLIPS, True), {}) == once
    twice = lineage(resume(folder, {"seed": 0, "clips": "x"}, CLIPS, True), {"seed": 0, "clips": "x"})
    assert twice[0] == once[0] and twice[1]["changes"] == ["seed 1 -> 0"]
    assert twice[0]["to"] == twice[1]["from"] != twice[0]["from"] == twice[1]["to"]
    assert lineage(None, {}) == []


def test_what_has_no_effect_at_a_start_is_told(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {"seed": 1, "clips": "x"}, config={"init_from": "other"})
    other, same = (resume(folder, {"seed": seed, "clips": "x"}, CLIPS, True) for seed in (0, 1))
    assert unneeded(True, None, other) == unneeded(False, "new", None) == unneeded(False, "other", same) == []
    assert unneeded(True, None, None) == ["resume_changed = true has no effect: there is no checkpoint"]
    assert unneeded(True, None, same) == ["resume_changed = true has no effect: nothing has changed"]
    assert unneeded(False, "new", same) == [
        "init_from = new has no effect: the run resumes from its own checkpoint"
    ]
