import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stdit.data.preparation import duplicates as module
from stdit.data.preparation.duplicates import dedupe_clips, find_duplicates, similar_pairs
from stdit.errors import UserError
from tests.data.preparation.conftest import pattern, read_csv, task


def distances(hashes: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(hashes, axis=1)
    return (bits[:, None] != bits[None]).sum(axis=2)


@pytest.fixture
def hashes() -> np.ndarray:
    """400 clips: 100 random ones, and three similar to each, a few bits away."""
    rng = np.random.default_rng(0)
    bits = np.repeat(rng.integers(0, 2, (100, 256), np.uint8), 4, axis=0)
    for row in bits:
        row[rng.choice(256, rng.integers(0, 14), replace=False)] ^= 1
    return np.packbits(rng.permutation(bits), axis=1)


@pytest.mark.parametrize("bits", [0, 5, 16, 64])
def test_banding_misses_no_pair(hashes: np.ndarray, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", 50)
    apart = distances(hashes)
    wanted = {
        (i, j, int(apart[i, j]))
        for i, j in itertools.combinations(range(len(hashes)), 2)
        if apart[i, j] <= bits
    }
    found = list(similar_pairs(hashes, bits))
    assert len(found) == len(set(found)) and set(found) == wanted
    assert bits < 5 or len(wanted) > 20


def test_the_best_clip_is_kept_and_kept_clips_differ(hashes: np.ndarray) -> None:
    volumes = np.random.default_rng(1).integers(1, 9, len(hashes)).tolist()
    gone = find_duplicates(hashes, volumes, 16)
    apart = distances(hashes)
    kept = [place for place in range(len(hashes)) if place not in gone]
    assert 100 <= len(kept) < 250
    assert min(apart[i, j] for i, j in itertools.combinations(kept, 2)) > 16
    for place, (better, distance) in gone.items():
        assert better not in gone and apart[place, better] == distance <= 16
        assert (-volumes[better], better) < (-volumes[place], place)


def test_equal_clips_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = np.zeros((100_000, 32), np.uint8)  # 5 * 10^9 pairs, if they were compared
    gone = find_duplicates(hashes, [1] * 99_999 + [2], 16)
    assert len(gone) == 99_999 and set(gone.values()) == {(99_999, 0)}


def test_copies_in_other_sizes_and_codecs_are_found(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    large = pattern(1, 16).repeat(2, axis=1).repeat(2, axis=2)
    write_video(tmp_path / "a" / "small.avi", frames=pattern(1, 16), codec="mpeg4")
    write_video(tmp_path / "a" / "z_large.mp4", frames=large)
    write_video(tmp_path / "a" / "other.mp4", frames=pattern(2, 16))
    write_video(tmp_path / "a" / "twin.mp4", frames=pattern(2, 16))
    (tmp_path / "a" / "broken.mp4").write_text("no video")
    lines = dedupe_clips(task(tmp_path / "a", tmp_path / "a" / "manifest.csv"))
    assert [row["path"] for row in read_csv(tmp_path / "a" / "manifest.csv")] == ["other.mp4", "z_large.mp4"]
    reasons = {row["path"]: row["reason"] for row in read_csv(tmp_path / "a" / "manifest.excluded.csv")}
    assert reasons["twin.mp4"] == "duplicate: of other.mp4, 0 bits apart"
    assert reasons["small.avi"].startswith("duplicate: of z_large.mp4, ") and "broken.mp4" in reasons
    assert any("2 x duplicate: small.avi (of z_large.mp4, " in line for line in lines)


def test_a_distance_out_of_range_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--distance 17: must be from 0"):
        dedupe_clips(task(tmp_path, tmp_path / "manifest.csv"), 17)
