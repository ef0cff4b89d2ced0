"""The rows of a large manifest are saved, and used as long as the manifest is the same."""

import logging

import pytest

from stdit.data.manifest import index, reading
from stdit.data.manifest.reading import read_manifest

HEADER = "path,text,num_frames,fps,height,width,start,camera"


@pytest.fixture
def csv(tmp_path, monkeypatch, write_video):
    """A manifest of complete rows, one to be probed, and one without a caption."""
    monkeypatch.setattr(index, "MIN_ROWS", 5)
    write_video(tmp_path / "p.mp4")
    rows = [f"{i}.mp4,clip {i} 🐈,{10 + i},8,32,{40 + i},{i % 2},pan {i}" for i in range(6)]
    path = tmp_path / "m.csv"
    path.write_text("\n".join([HEADER, *rows[:3], "p.mp4,probed,,,,,,", "bare.mp4,,4,8,32,32,,", *rows[3:]]))
    return path


def facts(outcome):
    clips, skipped = outcome
    return [(clip, clip.extra) for clip in clips], skipped


def read(csv, folder, **options):
    return facts(read_manifest(csv, index=folder / "kept" / "m.safetensors", **options))


def scans(monkeypatch):
    """Grows by one each time that rows are read."""
    made, scan = [], reading.scan_rows
    monkeypatch.setattr(reading, "scan_rows", lambda *args: made.append(args) or scan(*args))
    return made


def test_a_saved_scan_equals_the_scan(csv, tmp_path, monkeypatch):
    plain = facts(read_manifest(csv))
    made = scans(monkeypatch)
    first, again = (read(csv, tmp_path) for _ in range(2))
    assert first == again == plain and len(made) == 1
    assert [clip.text for clip, _ in again[0]][3] == "probed" and again[1] == [
        ("bare.mp4", "caption missing")
    ]


@pytest.mark.parametrize("what", ["content", "root", "weight", "caption_scores"])
def test_a_changed_manifest_or_setting_is_read_again(csv, tmp_path, monkeypatch, what):
    read(csv, tmp_path)
    made, options = scans(monkeypatch), {}
    if what == "content":
        csv.write_text(csv.read_text().replace("clip 0", "clip x"))
    else:
        options = {"root": {"root": tmp_path / "kept"}, "weight": {"weight": 2.0}}.get(
            what, {"caption_scores": ["camera"]}
        )
    assert read(csv, tmp_path, **options) == facts(read_manifest(csv, **options))
    assert len(made) == 2


@pytest.mark.parametrize("damage", [b"", b"\x08", b"\x02\0\0\0\0\0\0\0{}", None])
def test_a_damaged_index_is_replaced(csv, tmp_path, monkeypatch, damage):
    plain = read(csv, tmp_path)
    file = tmp_path / "kept" / "m.safetensors"
    file.write_bytes(file.read_bytes()[:-20] if damage is None else damage)
    made = scans(monkeypatch)
    assert read(csv, tmp_path) == plain == read(csv, tmp_path) and len(made) == 1


def test_small_manifests_and_full_disks_save_nothing(csv, tmp_path, monkeypatch, caplog):
    (tmp_path / "kept").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        read(csv, tmp_path)
    assert "cannot be written" in caplog.text
    (tmp_path / "kept").unlink()
    monkeypatch.setattr(index, "MIN_ROWS", 9)
    read(csv, tmp_path)
    assert not (tmp_path / "kept").exists()
