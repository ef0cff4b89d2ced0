"""A step of prepare_data.py that fails: what is lost, and that the corrected command works."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from scripts.prepare_data import main
from stdit.data.preparation import scoring
from stdit.errors import UserError
from tests.data.conftest import write_video  # noqa: F401 (a fixture)
from tests.data.preparation.conftest import pattern, read_csv

SCORER = """
import os, signal
from stdit.data.preparation.scoring import register_scorer

def own(frames, fps):
    {body}
    return frames.mean()

register_scorer("own", own)
"""


@pytest.fixture
def folder(tmp_path: Path, write_video: Callable[..., Path]) -> Path:  # noqa: F811
    """A folder of 12 clips; clip k is brighter than those before it."""
    for k in range(12):
        frames = np.full((4, 16, 16, 3), 20 * k, np.uint8)
        write_video(tmp_path / "clips" / f"{k:02d}.mp4", frames=frames)
    return tmp_path


@pytest.fixture
def run_score(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that runs `score` with a user's own scorer, whose module is read again each time."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    entries = dict(scoring.SCORERS._entries)

    def run(body: str, *flags: str) -> None:
        monkeypatch.setattr(scoring.SCORERS, "_entries", dict(entries))
        monkeypatch.delitem(sys.modules, "own_scorer_of_a_user", raising=False)
        (folder / "own_scorer_of_a_user.py").write_text(SCORER.format(body=body))
        command = ["score", "clips", "scored.csv", "--import", "own_scorer_of_a_user", "--scores", "own"]
        main([*command, *flags])

    return run


def test_a_scorer_that_fails_on_all_clips_stops_at_once_and_can_be_mended(
    folder: Path, run_score: Callable[..., None]
) -> None:
    message = "score own failed: ValueError: no weights\nstopped, since the first 10 clips"
    with pytest.raises(UserError, match=message):
        run_score("open('calls', 'a').write('x'); raise ValueError('no weights')", "--workers", "0")
    assert (folder / "calls").read_text() == "x" * 10, "not 12"
    assert not [path.name for path in folder.iterdir() if path.suffix in (".csv", ".partial")]
    run_score("pass", "--workers", "0")
    assert len(read_csv(folder / "scored.csv")) == 12


def test_failures_are_tried_again_and_a_changed_scorer_begins_again(
    folder: Path, run_score: Callable[..., None]
) -> None:
    run_score("if frames.mean() > 150: raise ValueError(frames.mean())", "--workers", "0")
    assert len(read_csv(folder / "scored.excluded.csv")) == 4
    with pytest.raises(KeyboardInterrupt):  # clips 0 to 4 are done, and 5 failed before
        halt = "if frames.mean() > 110: raise KeyboardInterrupt\n    if frames.mean() > 90: raise ValueError"
        run_score(halt, "--workers", "0", "--overwrite")
    assert (folder / "scored.csv.partial").exists()
    run_score("frames = frames * 0", "--workers", "0", "--overwrite")
    rows = read_csv(folder / "scored.csv")
    assert len(rows) == 12 and {row["own"] for row in rows} == {"0.0"}
    assert not (folder / "scored.excluded.csv").exists() and not (folder / "scored.csv.partial").exists()


@pytest.mark.parametrize(
    "death", ["os.kill(os.getpid(), signal.SIGSEGV)", "os._exit(3)", "raise SystemExit(3)"]
)
def test_a_scorer_that_kills_its_process_costs_one_clip_with_its_name(
    folder: Path, run_score: Callable[..., None], death: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_score(f"if 90 < frames.mean() < 110: {death}", "--workers", "2")
    (lost,) = read_csv(folder / "scored.excluded.csv")
    assert lost["path"] == "clips/05.mp4" and "05.mp4" in capsys.readouterr().out
    assert ("died (" in lost["reason"]) == (death[0] == "o")
    assert len(read_csv(folder / "scored.csv")) == 11


def test_a_filter_that_keeps_nothing_does_not_block_the_corrected_one(folder: Path) -> None:
    source, output = folder / "source.csv", folder / "good.csv"
    source.write_text("path,text,motion\na.mp4,a,1\nb.mp4,b,3\n")
    for _ in range(2):
        with pytest.raises(UserError, match="no clip is left"):
            main(["filter", str(source), str(output), "--where", "motion > 20"])
        assert len(read_csv(folder / "good.excluded.csv")) == 2
    main(["filter", str(source), str(output), "--where", "motion > 2"])
    assert [row["path"] for row in read_csv(output)] == ["b.mp4"]
    with pytest.raises(UserError, match="good.csv stays as it was"):
        main(["filter", str(source), str(output), "--where", "motion > 20", "--overwrite"])
    assert [row["path"] for row in read_csv(output)] == ["b.mp4"]
    assert [row["path"] for row in read_csv(folder / "good.excluded.csv")] == ["a.mp4"]


def test_a_split_that_fails_or_is_interrupted_does_not_block_the_next(
    folder: Path,
    write_video: Callable[..., Path],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["split", str(folder / "clips"), str(folder / "scenes.csv"), "--workers", "0"]
    command += ["--cut", str(folder / "cut"), "--min_seconds"]
    with pytest.raises(UserError, match="no clip is left"):
        main([*command, "9"])
    from stdit.data.preparation import scenes

    cut = scenes.cut_clip

    def interrupted(*arguments: object) -> object:
        cut(*arguments)  # type: ignore[arg-type]
        (folder / "cut" / ".000000000.mp4.1.tmp").touch()  # as of a worker that is killed
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "cut_clip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([*command, "0.2"])
    monkeypatch.setattr(scenes, "cut_clip", cut)
    main([*command, "0.1"])
    assert len(read_csv(folder / "scenes.csv")) == 12
    assert not list((folder / "cut").rglob(".*"))
    with pytest.raises(UserError, match="cut is not empty"):
        main([*command[:2], str(folder / "more.csv"), *command[3:], "0.1"])


def test_clips_of_any_shape_get_a_motion_score(
    tmp_path: Path,
    write_video: Callable[..., Path],  # noqa: F811
) -> None:
    """OpenCV's optical flow ended the process on frames of 256x20 pixels."""
    for height, width in ((100, 1280), (40, 640), (640, 40), (16, 700)):
        rows, columns = np.mgrid[0:height, 0:width]
        speed, wave = max(height, width) / 128, 40 / max(height, width)
        pictures = [127 + 100 * np.sin((columns - speed * k) * wave + rows / 9) for k in range(8)]
        frames = np.stack(pictures).astype(np.uint8)[..., None].repeat(3, axis=3)
        write_video(tmp_path / "clips" / f"{width}x{height}.mp4", frames=frames)
    main(
        [
            "score",
            str(tmp_path / "clips"),
            str(tmp_path / "scored.csv"),
            "--workers",
            "1",
            "--scores",
            "motion",
        ]
    )
    motions = {row["path"]: float(row["motion"]) for row in read_csv(tmp_path / "scored.csv")}
    assert len(motions) == 4 and all(0 < motion < 15 for motion in motions.values()), motions


def test_padding_leaves_other_shapes_as_they_were() -> None:
    cv2 = scoring.opencv()
    frames = pattern(1, 3)
    greys = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    lengths = [
        np.linalg.norm(flow.calc(a, b, None), axis=2).mean() for a, b in zip(greys, greys[1:], strict=False)
    ]
    assert scoring.SCORERS.get("motion")(frames, 8.0) == 100 * 8.0 * float(np.mean(lengths)) / 64


def test_clips_without_a_caption_are_counted_at_every_step(
    tmp_path: Path,
    write_video: Callable[..., Path],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    for k in range(3):
        write_video(tmp_path / "clips" / f"{k}.mp4", frames=pattern(k, 16))
    (tmp_path / "clips" / "1.txt").write_text("a ball")
    source = str(tmp_path / "clips")
    for step, *flags in (
        ["probe"], ["split"], ["score", "--scores", "brightness"], ["filter", "--where", "fps > 1"], ["dedupe"],
        ["report"],
    ):  # fmt: skip
        output = str(tmp_path / f"{step}.{'html' if step == 'report' else 'csv'}")
        main([step, source, output, *flags, *([] if step == "filter" else ["--workers", "0"])])
        assert re.search(r"3 (of 3 )?clips, 2 without a caption", capsys.readouterr().out), step
        source = output


@pytest.mark.parametrize(("first", "second", "kept"), [
    ("a.mp4,,,", "b.mp4,a ball,,", "b.mp4"),
    ("a.mp4,,,calm", "b.mp4,a ball,,", "b.mp4"),
    ("a.mp4,a ball,,", "b.mp4,a ball,,calm", "b.mp4"),
    ("link.mp4,a ball,,", "b.mp4,a ball,,", "b.mp4"),
    ("link.mp4,a ball,,calm", "b.mp4,a ball,,", "link.mp4"),
    ("b.mp4,a ball,,", "a.mp4,a ball,,", "b.mp4"),
    ("a.mp4,a ball,,", "large.mp4,a ball,,", "large.mp4"),
    ("large.mp4,,,", "a.mp4,a ball,,", "a.mp4"),
])  # fmt: skip
def test_dedupe_keeps_the_copy_that_is_worth_most(
    tmp_path: Path,
    write_video: Callable[..., Path],  # noqa: F811
    first: str,
    second: str,
    kept: str,
) -> None:
    """A caption decides before the size, then the other columns, then that it is no link, then the order."""
    frames = pattern(1, 16)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames=frames)
    write_video(tmp_path / "large.mp4", frames=frames.repeat(2, axis=1).repeat(2, axis=2))
    (tmp_path / "link.mp4").symlink_to("a.mp4")
    (tmp_path / "source.csv").write_text(f"path,text,camera,mood\n{first}\n{second}\n")
    main(["dedupe", str(tmp_path / "source.csv"), str(tmp_path / "kept.csv"), "--workers", "0"])
    assert [row["path"] for row in read_csv(tmp_path / "kept.csv")] == [kept]
