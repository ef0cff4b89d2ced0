import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stdit.data.decoding.media import Media
from stdit.data.preparation import scoring
from stdit.data.preparation.flow import Section
from stdit.data.preparation.scoring import SCORES, View, middle_frames, score_clips
from stdit.errors import UserError
from tests.data.preparation.conftest import pattern, read_csv, task

LIGHT = ("motion", "difference", "sharpness", "brightness", "contrast")


def smooth(speed: int) -> np.ndarray:
    """A pattern without steps, which optical flow can follow."""
    rows, columns = np.mgrid[0:64, 0:96]
    frames = [
        127 + 60 * np.sin((columns - speed * k) / 5) + 60 * np.sin(rows / 7 + (columns - speed * k) / 11)
        for k in range(8)
    ]
    return np.stack(frames).clip(0, 255).astype(np.uint8)[..., None].repeat(3, axis=3)


def test_motion_is_in_percent_of_the_longer_side_a_second() -> None:
    moving = SCORES["motion"](smooth(2), 8.0)
    assert moving == pytest.approx(100 * 2 * 8 / 96, rel=0.25)
    assert SCORES["motion"](smooth(1), 8.0) == pytest.approx(moving / 2, rel=0.25)
    assert SCORES["motion"](smooth(0), 8.0) < 0.1
    assert SCORES["motion"](smooth(2)[:1], 8.0) == SCORES["difference"](smooth(2)[:1], 8.0) == 0


def test_scores_of_known_frames() -> None:
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    frames[:, :, 16:] = 200
    frames[1::2, :, 16:] = 100
    assert SCORES["brightness"](frames, 8) == pytest.approx(75, abs=0.1)
    assert SCORES["contrast"](frames, 8) == pytest.approx(75, abs=0.1)
    assert SCORES["difference"](frames, 8) == pytest.approx(50, abs=0.1)
    sharp = pattern(0, 2)
    assert SCORES["sharpness"](sharp, 8) > 10 * SCORES["sharpness"](smooth(0), 8)


def test_text_is_found_where_there_is_some() -> None:
    pytest.importorskip("rapidocr"), pytest.importorskip("onnxruntime")
    cv2 = scoring.opencv()
    plain = np.full((1, 144, 256, 3), 90, np.uint8)
    lettered = plain.copy()
    cv2.putText(lettered[0], "BREAKING NEWS", (20, 120), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (255, 255, 255), 2)
    assert SCORES["text_area"](plain, 8) == 0
    assert 5 < SCORES["text_area"](lettered, 8) < 30


def test_the_window_is_the_middle_of_the_clip(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    media = Media.of(write_video(tmp_path / "a.mp4", num_frames=24))  # frame k has the level 10 k

    def levels(view: View, start: float = math.nan, end: float = math.nan) -> list[int]:
        frames = middle_frames(Section(media, start=start, end=end), view)
        return [round(float(frame.mean()) / 10) for frame in frames]

    assert levels(View(frames=8, fps=8)) == list(range(8, 16))
    assert levels(View(frames=4, fps=4)) == [8, 10, 12, 14]
    assert levels(View(frames=99, fps=8)) == list(range(24))
    assert levels(View(frames=1)) == [12] or levels(View(frames=1)) == [11]
    assert levels(View(frames=4, fps=8), 1.0, 2.0) == [10, 11, 12, 13]
    assert middle_frames(Section(media), View(frames=2, side=16)).shape == (2, 16, 16, 3)


def test_columns_are_added_and_others_kept(clips: Path) -> None:
    source, output = clips / "source.csv", clips / "scored.csv"
    source.write_text("path,text,mood\na.mp4,ball,calm\nbroken.mp4,x,y\nc.mp4,,wild\n")
    score_clips(task(source, output), LIGHT)
    rows = read_csv(output)
    assert list(rows[0]) == ["path", "text", "mood", *LIGHT]
    assert [(row["path"], row["text"], row["mood"]) for row in rows] == [
        ("a.mp4", "ball", "calm"),
        ("c.mp4", "", "wild"),
    ]
    assert all(float(row[name]) > 0 for row in rows for name in LIGHT)
    assert read_csv(clips / "scored.left_out.csv")[0]["reason"].startswith("cannot be read: ")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_scores_of_a_user.py").write_text(
        "def length(frames):\n"
        "    assert frames.dtype == 'uint8' and frames.shape[1:] == (48, 64, 3)\n"
        "    return len(frames)\n"
        "def fussy(frames):\n"
        "    if len(frames) == 8: raise RuntimeError('eight: of all numbers')\n"
        "    return {'low': float(frames.min()), 'high': frames.max()}\n"
        "def infinite(frames): return float('inf') if len(frames) == 8 else 1\n"
        "def caption(frames): return {'text': 1.0}\n"
        "number = 7\n"
    )
    monkeypatch.chdir(tmp_path)
    scoring.own_scorer.cache_clear()


@pytest.mark.usefixtures("own")
def test_a_users_own_scorers(clips: Path) -> None:
    output = clips / "scored.csv"
    names = [f"own_scores_of_a_user:{name}" for name in ("length", "fussy")]
    lines = score_clips(task(clips, output), ["brightness"], names, View(frames=64))
    rows = read_csv(output)
    assert [(row["path"], row["length"]) for row in rows] == [("a.mp4", "16.0"), ("c.mp4", "24.0")]
    assert list(rows[0])[-4:] == ["brightness", "length", "low", "high"]
    failed = next(row for row in read_csv(clips / "scored.left_out.csv") if row["path"] == "b.mp4")
    assert failed["reason"] == f"scorer {names[1]} failed: RuntimeError: eight: of all numbers"
    assert any(f"1 x scorer {names[1]} failed" in line for line in lines)

    score_clips(task(clips, output, overwrite=True), [], ["own_scores_of_a_user:infinite"])
    assert [row["path"] for row in read_csv(output)] == ["a.mp4", "c.mp4"]


@pytest.mark.usefixtures("own")
def test_bad_scorers_are_named_before_the_work(clips: Path) -> None:
    job = task(clips, clips / "scored.csv")
    for scores, scorers, message in (
        ([], [], "--scores is empty"),
        (["movement"], [], "--scores movement: is not one of motion, "),
        ([], ["own_scores_of_a_user"], "must be module:function"),
        ([], ["no_such_module:f"], "no_such_module cannot be imported"),
        ([], ["own_scores_of_a_user:lenght"], "has no function lenght"),
        ([], ["own_scores_of_a_user:number"], "has no function number"),
        ([], ["own_scores_of_a_user:caption"], "gives 'text': a score needs a name of its own"),
    ):
        with pytest.raises(UserError, match=message):
            score_clips(job, scores, scorers)
    with pytest.raises(UserError, match="--frames 0: must be from 1"):
        score_clips(job, LIGHT, view=View(frames=0))
    assert not job.output.exists()
