"""One rule for damaged files in every step: what comes before the damage is used, and nothing after it."""

import html
from pathlib import Path

import pytest

from scripts.prepare_data import main
from stdit.data.build import build_assignment
from stdit.data.clip_tensors import middle_window
from stdit.data.config import BucketConfig, DataConfig
from stdit.data.decoding.decode import DecodeError, decode_clip
from tests.data.awkward import bit_rot, noisy, truncated, write
from tests.data.preparation.conftest import read_csv

SPLIT = ["--min_seconds", "0.5"]


def damaged_folder(folder: Path) -> Path:
    folder.mkdir()
    bit_rot(folder / "rot.mp4")
    truncated(folder / "cut.mp4")
    write(folder / "whole.mp4", noisy())
    for name in ("rot", "cut", "whole"):
        (folder / f"{name}.txt").write_text(name)
    return folder


def prepare(*argv: object) -> None:
    main([*map(str, argv), "--workers", "0"])


def test_probe_says_how_many_seconds_are_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = damaged_folder(tmp_path / "clips")
    prepare("probe", folder, folder / "probed.csv")
    said = capsys.readouterr().out
    rows = {row["path"]: row for row in read_csv(folder / "probed.csv")}
    assert (rows["rot.mp4"]["num_frames"], rows["rot.mp4"]["readable_seconds"]) == ("10", "1.25")
    assert rows["rot.mp4"]["damage"].startswith(
        "from 1.250 s of 2.000 s on: not a readable video, or damaged"
    )
    assert (rows["whole.mp4"]["readable_seconds"], rows["whole.mp4"]["damage"]) == ("2.0", "")
    assert 0.5 < float(rows["cut.mp4"]["readable_seconds"]) < 1.6
    assert "rot.mp4: damaged from 1.250 s of 2.000 s on" in said
    for name, row in rows.items():  # all of what is readable is decoded, and nothing that follows
        count = int(row["num_frames"])
        assert decode_clip(folder / name, count, float(row["fps"]), 48, 64).shape[0] == count
        with pytest.raises(DecodeError):
            decode_clip(folder / name, count + 1, float(row["fps"]), 48, 64)

    prepare("report", folder / "probed.csv", tmp_path / "report.html")
    page = html.unescape((tmp_path / "report.html").read_text())
    assert f"{len(rows) - 1} clips are damaged: what comes before the damage is used" in page


def test_quick_probe_decodes_no_whole_files(tmp_path: Path) -> None:
    folder = damaged_folder(tmp_path / "clips")
    prepare("probe", folder, folder / "probed.csv", "--quick")
    rows = {row["path"]: row for row in read_csv(folder / "probed.csv")}
    row = rows["rot.mp4"]
    assert row["num_frames"] == "16" and not row["damage"]
    assert not row["readable_seconds"], "not known: only a few frames were decoded"


@pytest.mark.parametrize("probed", [True, False])
def test_split_keeps_the_scenes_before_the_damage(tmp_path: Path, probed: bool) -> None:
    folder = damaged_folder(tmp_path / "clips")
    source = folder
    if probed:
        source = folder / "probed.csv"
        prepare("probe", folder, source)
    for name, flags in (("scenes.csv", []), ("files.csv", ["--cut", folder / "files"])):
        prepare("split", source, folder / name, *SPLIT, *flags)
        rows = read_csv(folder / name)
        assert len(rows) == 3
        excluded = read_csv(folder / name.replace(".csv", ".excluded.csv"))
        assert {row["path"] for row in excluded} == {"rot.mp4", "cut.mp4"}
        assert all(row["reason"].startswith("damaged: ") for row in excluded)
        bucket = BucketConfig(num_frames=8, fps=8, height=48, width=64)
        assignment = build_assignment(DataConfig(manifest=str(folder / name), buckets=[bucket]))
        for place in assignment.members[0].tolist():
            assert middle_window(assignment.clips[place], assignment.buckets[0]).shape[0] == 8
    rot = next(row for row in read_csv(folder / "scenes.csv") if row["path"] == "rot.mp4")
    assert (float(rot["start"]), float(rot["end"])) == (0.0, 1.25)
