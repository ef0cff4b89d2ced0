import hashlib
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from stdit.data.decoding.decode import probe
from stdit.data.decoding.examine import Examination, examine
from stdit.data.decoding.media import Media
from stdit.data.manifest.reading import read_manifest
from stdit.data.preparation import probing
from stdit.data.preparation.flow import ClipRecord
from stdit.data.preparation.probing import probe_clips
from stdit.data.preparation.scoring import ScoringWindow, middle_frames
from stdit.errors import UserError
from stdit.pipelines.video_io import write_mp4
from tests.data.preparation.conftest import read_csv, task


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.glob("*.mp4")}


def test_a_folder_becomes_a_manifest_and_broken_files_are_listed(clips: Path) -> None:
    before = contents(clips)
    lines = probe_clips(task(clips, clips / "manifest.csv"))
    assert [row["path"] for row in read_csv(clips / "manifest.csv")] == ["a.mp4", "b.mp4", "c.mp4"]
    assert read_csv(clips / "manifest.csv")[0] == {
        **{"path": "a.mp4", "text": 'a red, "large" ball'},
        **{"num_frames": "16", "fps": "8.0", "height": "48", "width": "64"},
        **{"color_space": "SDR", "field_order": "progressive", "readable_seconds": "2.0", "damage": ""},
    }
    reasons = {row["path"]: row["reason"] for row in read_csv(clips / "manifest.excluded.csv")}
    assert set(reasons) == {"broken.mp4", "empty.mp4", "outside.mp4"}
    assert (
        reasons["broken.mp4"].startswith("cannot be read: not a")
        and "empty (0 bytes)" in reasons["empty.mp4"]
    )
    assert reasons["outside.mp4"].startswith("outside the data root")
    assert "3 of 6 clips" in lines[0] and "3 excluded, listed in" in lines[1]
    assert "2 x cannot be read: broken.mp4 (" in lines[2]
    assert contents(clips) == before and len(list(clips.iterdir())) == 10  # nothing else was left behind


@pytest.mark.parametrize("fps, num_frames", [(24, 5), (25, 7), (30, 6)])
def test_a_whole_rate_is_written_as_one(tmp_path: Path, fps: int, num_frames: int) -> None:
    write_mp4(tmp_path / "a.mp4", np.zeros((num_frames, 16, 16, 3), np.uint8), fps)
    (tmp_path / "a.txt").write_text("a black square")
    assert probe(tmp_path / "a.mp4").fps != fps, "frames over seconds, each rounded"
    probe_clips(task(tmp_path, tmp_path / "manifest.csv"))
    assert read_csv(tmp_path / "manifest.csv")[0]["fps"] == f"{fps}.0"


def test_paths_are_right_for_the_output(clips: Path, tmp_path: Path) -> None:
    probe_clips(task(clips, tmp_path / "all.csv"))
    assert [row["path"] for row in read_csv(tmp_path / "all.csv")] == [
        "clips/a.mp4",
        "clips/b.mp4",
        "clips/c.mp4",
    ]

    elsewhere = tmp_path / "made" / "all.csv"
    (line, *_) = probe_clips(task(clips, elsewhere))
    assert f"add --root {clips}" in line
    assert [row["path"] for row in read_csv(elsewhere)] == ["a.mp4", "b.mp4", "c.mp4"]
    probe_clips(task(elsewhere, tmp_path / "again.csv", root=clips))
    assert read_csv(tmp_path / "again.csv") == read_csv(tmp_path / "all.csv")


def test_invalid_rows_are_excluded(clips: Path) -> None:
    rows = ["a.mp4,ball,x,,", "../outside.mp4,ball,y,,", "missing.mp4,,z,,", ",ball,,,"]
    rows += [
        "a.mp4,part,w,0.5,1.5",
        "a.mp4,end,,1.5,1.0",
        "a.mp4,late,,5,9",
        "a.mp4,word,,soon,",
        "a.mp4,open,,1.5,",
        "b.mp4,a, b,c,0,1",
    ]
    source = clips / "rows.csv"
    source.write_text("\n".join(["path,text,mood,start,end", *rows]) + "\n")
    probe_clips(task(source, clips / "manifest.csv"))
    kept = [(row["text"], row["mood"], row["num_frames"]) for row in read_csv(clips / "manifest.csv")]
    assert kept == [("ball", "x", "16"), ("part", "w", "16"), ("open", "", "16")]
    excluded = [
        (row["text"], row["reason"].partition(":")[0]) for row in read_csv(clips / "manifest.excluded.csv")
    ]
    assert excluded == [
        ("ball", f"outside the data root {clips}, where no file is opened"),
        ("", "file missing"),
        ("ball", "path missing"),
        ("end", "no frame from start to end"),
        ("late", "no frame from start to end"),
        ("word", "start is not a number of 0 or more"),
        ("a", "malformed row"),
    ]


def test_a_file_is_read_once_however_many_of_its_parts_are_listed(
    clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def examined(media: Media, quick: bool) -> Examination:
        seen.append(media.name)
        return examine(media, quick)

    monkeypatch.setattr(probing, "examine", examined)
    source = clips / "rows.csv"
    source.write_text(
        "path,text,start,end\na.mp4,first,0,1\nb.mp4,ball,,\na.mp4,second,1,2\na.mp4,late,5,9\n"
    )
    probe_clips(task(source, clips / "probed.csv"))
    assert seen == ["a.mp4", "b.mp4"]
    assert [row["text"] for row in read_csv(clips / "probed.csv")] == ["first", "ball", "second"]
    (late,) = read_csv(clips / "probed.excluded.csv")
    assert late["reason"] == "no frame from start to end: 5 to 9 s of 2 s"


def test_wrong_values_of_what_is_probed_are_replaced(clips: Path) -> None:
    source = clips / "rows.csv"
    source.write_text("path,text,num_frames,height,field_order\na.mp4,ball,many,-4,up\n")
    probe_clips(task(source, clips / "probed.csv"))
    (row,) = read_csv(clips / "probed.csv")
    assert (row["num_frames"], row["height"], row["field_order"]) == ("16", "48", "progressive")


def test_a_source_without_usable_clips_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    with pytest.raises(UserError, match="clips: there is no such folder or manifest"):
        probe_clips(task(folder, tmp_path / "manifest.csv"))
    folder.mkdir()
    with pytest.raises(UserError, match="clips lists no clips"):
        probe_clips(task(folder, tmp_path / "manifest.csv"))
    (folder / "a.mp4").write_text("no video")
    with pytest.raises(UserError, match="no clip is left\n1 excluded, listed in (.*)"):
        probe_clips(task(folder, tmp_path / "manifest.csv"))
    assert read_csv(tmp_path / "manifest.excluded.csv")[0]["path"] == "clips/a.mp4"
    assert not (tmp_path / "manifest.csv").exists()


def test_nothing_is_overwritten_without_the_flag(clips: Path) -> None:
    output, excluded = clips / "manifest.csv", clips / "manifest.excluded.csv"
    output.write_text("path,text\na.mp4,mine\n")
    with pytest.raises(UserError, match="manifest.csv exists: .* --overwrite"):
        probe_clips(task(clips, output))
    with pytest.raises(UserError, match="is the source, which is never changed"):
        probe_clips(task(output, output, overwrite=True))
    for name, message in (("a.mp4", "must end in .csv"), ("list.xls", "must end in"), ("new", "must end in")):
        with pytest.raises(UserError, match=message):
            probe_clips(task(clips, clips / name))
    with pytest.raises(UserError, match="--workers -1"):
        probe_clips(task(clips, clips / "new.csv", workers=-1))
    assert output.read_text() == "path,text\na.mp4,mine\n" and not excluded.exists()
    (clips / "mine").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory|cannot be written: File exists"):
        probe_clips(task(clips, clips / "mine" / "manifest.csv"))

    excluded.write_text("stale")
    probe_clips(task(output, clips / "other.csv"))
    assert excluded.read_text() == "stale"
    with pytest.raises(UserError, match="manifest.excluded.csv exists"):
        output.unlink()
        probe_clips(task(clips / "other.csv", output))
    probe_clips(task(clips / "other.csv", output, overwrite=True))
    assert (
        read_csv(output) == read_csv(clips / "other.csv") and not excluded.exists()
    )  # there was nothing to list


def test_an_interrupted_step_resumes_and_reads_changed_files_again(
    clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    interrupted_at = "b.mp4"

    def probed(record: ClipRecord) -> dict[str, float]:
        seen.append(Path(record.media.location).name)
        if seen[-1] == interrupted_at:
            raise KeyboardInterrupt
        return record.file_info()._asdict()

    monkeypatch.setattr(probing, "_probe", probed)
    output = clips / "manifest.csv"
    with pytest.raises(KeyboardInterrupt):
        probe_clips(task(clips, output))
    assert seen == ["a.mp4", "b.mp4"] and not output.exists() and not list(clips.glob(".*"))

    interrupted_at = ""
    probe_clips(task(clips, output))
    assert seen[2:] == ["b.mp4", "broken.mp4", "c.mp4", "empty.mp4"]
    assert len(read_csv(output)) == 3 and not (clips / "manifest.csv.partial").exists()

    interrupted_at = "b.mp4"
    with pytest.raises(KeyboardInterrupt):
        probe_clips(task(clips, clips / "other.csv"))
    os.utime(clips / "a.mp4", ns=(1, 1))
    interrupted_at, seen[:] = "", []
    probe_clips(task(clips, clips / "other.csv"))
    assert seen[:2] == ["a.mp4", "b.mp4"]


def test_worker_processes_give_the_same_output(clips: Path) -> None:
    probe_clips(task(clips, clips / "one.csv"))
    probe_clips(task(clips, clips / "two.csv", workers=2))
    for kind in (".csv", ".excluded.csv"):
        assert (clips / f"one{kind}").read_text() == (clips / f"two{kind}").read_text()


def test_tar_shards_are_read_in_place(clips: Path, tmp_path: Path) -> None:
    shard = tmp_path / "shards" / "0.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as archive:
        for name in ("a.mp4", "a.txt", "broken.mp4"):
            archive.add(clips / name, name)
    probe_clips(task(tmp_path / "shards" / "*.tar", tmp_path / "all.jsonl"))
    (row,) = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert row["path"] == "shards/0.tar" and row["member"] == "a.mp4" and row["num_frames"] == 16
    found, _ = read_manifest(tmp_path / "all.jsonl")
    assert (
        found[0].text == 'a red, "large" ball'
        and middle_frames(ClipRecord(found[0].media), ScoringWindow()).shape[0] == 16
    )
    (excluded,) = [json.loads(line) for line in (tmp_path / "all.excluded.jsonl").read_text().splitlines()]
    assert excluded["member"] == "broken.mp4" and excluded["reason"].startswith("cannot be read")
