import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stdit.cli import import_modules
from stdit.data.decoding.media import Media
from stdit.data.preparation import scoring
from stdit.data.preparation.flow import ClipRecord
from stdit.data.preparation.scoring import SCORERS, ScoringWindow, middle_frames, score_clips
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


def test_motion_is_in_percent_of_the_longer_side_per_second() -> None:
    moving = SCORERS.get("motion")(smooth(2), 8.0)
    assert moving == pytest.approx(100 * 2 * 8 / 96, rel=0.25)
    assert SCORERS.get("motion")(smooth(1), 8.0) == pytest.approx(moving / 2, rel=0.25)
    assert SCORERS.get("motion")(smooth(0), 8.0) < 0.1
    assert SCORERS.get("motion")(smooth(2)[:1], 8.0) == SCORERS.get("difference")(smooth(2)[:1], 8.0) == 0


def test_scores_of_known_frames() -> None:
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    frames[:, :, 16:] = 200
    frames[1::2, :, 16:] = 100
    assert SCORERS.get("brightness")(frames, 8) == pytest.approx(75, abs=0.1)
    assert SCORERS.get("contrast")(frames, 8) == pytest.approx(75, abs=0.1)
    assert SCORERS.get("difference")(frames, 8) == pytest.approx(50, abs=0.1)
    sharp = pattern(0, 2)
    assert SCORERS.get("sharpness")(sharp, 8) > 10 * SCORERS.get("sharpness")(smooth(0), 8)


def test_text_area() -> None:
    pytest.importorskip("rapidocr"), pytest.importorskip("onnxruntime")
    cv2 = scoring.opencv()
    plain = np.full((1, 144, 256, 3), 90, np.uint8)
    lettered = plain.copy()
    cv2.putText(lettered[0], "BREAKING NEWS", (20, 120), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (255, 255, 255), 2)
    assert SCORERS.get("text_area")(plain, 8) == 0
    assert 5 < SCORERS.get("text_area")(lettered, 8) < 30


def test_the_window_is_the_middle_of_the_clip(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    media = Media.of(write_video(tmp_path / "a.mp4", num_frames=24))  # frame k has the level 10 k

    def levels(view: ScoringWindow, start: float = math.nan, end: float = math.nan) -> list[int]:
        frames = middle_frames(ClipRecord(media, start=start, end=end), view)
        return [round(float(frame.mean()) / 10) for frame in frames]

    assert levels(ScoringWindow(frames=8, fps=8)) == list(range(8, 16))
    assert levels(ScoringWindow(frames=4, fps=4)) == [8, 10, 12, 14]
    assert levels(ScoringWindow(frames=99, fps=8)) == list(range(24))
    assert levels(ScoringWindow(frames=1)) == [12] or levels(ScoringWindow(frames=1)) == [11]
    assert levels(ScoringWindow(frames=4, fps=8), 1.0, 2.0) == [10, 11, 12, 13]
    assert middle_frames(ClipRecord(media), ScoringWindow(frames=2, side=16)).shape == (2, 16, 16, 3)


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
    assert read_csv(clips / "scored.excluded.csv")[0]["reason"].startswith("cannot be read: ")


def test_columns_of_the_source_are_not_replaced_in_silence(clips: Path) -> None:
    source, output = clips / "source.csv", clips / "scored.csv"
    source.write_text("path,text,contrast,brightness\na.mp4,ball,7,\nc.mp4,cat,low,\nb.mp4,,,\n")
    lines = score_clips(task(source, output), ["brightness", "contrast"])
    assert [line for line in lines if line.startswith("column")] == [
        "column contrast: 2 of 3 values of the source are replaced by this score; rename the column in the source "
        "to keep both"
    ]
    lines = score_clips(task(output, clips / "again.csv"), ["brightness", "contrast"])
    assert not [line for line in lines if line.startswith("column")], "the same values"


@pytest.fixture
def own_scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's module, whose import registers scorers."""
    (tmp_path / "own_scores_of_a_user.py").write_text(
        "import time\n"
        "from stdit.data.preparation.scoring import register_scorer\n"
        "def length(frames, fps):\n"
        "    assert frames.dtype == 'uint8' and frames.shape[1:] == (48, 64, 3) and fps == 8\n"
        "    return len(frames)\n"
        "def fussy(frames, fps):\n"
        "    if len(frames) == 8: raise RuntimeError('eight: of all numbers')\n"
        "    return {'low': float(frames.min()), 'high': frames.max()}\n"
        "def infinite(frames, fps): return float('inf') if len(frames) == 8 else 1\n"
        "def caption(frames, fps): return {'text': 1.0}\n"
        "def tone(frames, fps): return {'brightness': 1.0}\n"
        "def slow(frames, fps):\n"
        "    while len(frames) == 8: time.sleep(1)\n"
        "    return 1\n"
        "for scorer in (length, fussy, infinite, caption, tone, slow): register_scorer(scorer.__name__, scorer)\n"
        "register_scorer('unnamed', lambda frames, fps: 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scoring.SCORERS, "_entries", dict(scoring.SCORERS._entries))
    monkeypatch.delitem(sys.modules, "own_scores_of_a_user", raising=False)
    import_modules(["own_scores_of_a_user"])


@pytest.mark.usefixtures("own_scorers")
def test_a_users_own_scorers(clips: Path) -> None:
    output = clips / "scored.csv"
    names = ["brightness", "length", "fussy"]
    lines = score_clips(task(clips, output), names, ScoringWindow(frames=64))
    rows = read_csv(output)
    assert [(row["path"], row["length"]) for row in rows] == [("a.mp4", "16.0"), ("c.mp4", "24.0")]
    assert list(rows[0])[-4:] == ["brightness", "length", "low", "high"]
    failed = next(row for row in read_csv(clips / "scored.excluded.csv") if row["path"] == "b.mp4")
    assert failed["reason"] == "score fussy failed: RuntimeError: eight: of all numbers"
    assert any("1 x score fussy failed" in line for line in lines)

    score_clips(task(clips, output, overwrite=True), ["infinite"])
    assert [row["path"] for row in read_csv(output)] == ["a.mp4", "c.mp4"]


@pytest.mark.usefixtures("own_scorers")
def test_a_scorer_that_hangs_costs_only_its_clip(clips: Path) -> None:
    output = clips / "scored.csv"
    score_clips(task(clips, output, workers=2, timeout=5), ["slow"], ScoringWindow(frames=64))
    assert [(row["path"], row["slow"]) for row in read_csv(output)] == [("a.mp4", "1.0"), ("c.mp4", "1.0")]
    reasons = {row["path"]: row["reason"] for row in read_csv(clips / "scored.excluded.csv")}
    assert reasons["b.mp4"] == "took longer than 5 s (--timeout)"


@pytest.mark.usefixtures("own_scorers")
def test_bad_scores_are_errors(clips: Path) -> None:
    job = task(clips, clips / "scored.csv")
    for scores, message in (
        ([], "--scores is empty"),
        (["movement"], "--scores = movement: must be one of motion, "),
        (["lenght"], "did you mean length"),
        (
            ["brightness", "tone"],
            "score tone: another score writes the column brightness, too: leave one out",
        ),
        (["caption"], "score caption: 'text' cannot be a column: choose an identifier, such as aesthetic"),
    ):
        with pytest.raises(UserError, match=message):
            score_clips(job, scores)
    with pytest.raises(UserError, match="unnamed cannot be sent to other processes .* or add --workers 0"):
        score_clips(task(clips, clips / "scored.csv", workers=1), ["unnamed"])
    with pytest.raises(UserError, match="--frames 0: must be from 1"):
        score_clips(job, LIGHT, window=ScoringWindow(frames=0))
    with pytest.raises(UserError, match="--timeout -1: must be seconds"):
        score_clips(task(clips, clips / "scored.csv", timeout=-1), LIGHT)
    assert not job.output.exists()
    with pytest.raises(UserError, match="motion: this name is already registered"):
        scoring.register_scorer("motion", len)  # type: ignore[arg-type]
    for name in ("text", "two words"):
        with pytest.raises(UserError, match=f"'{name}' cannot be a column"):
            scoring.register_scorer(name, len)  # type: ignore[arg-type]
