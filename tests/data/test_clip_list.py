from dataclasses import replace
from pathlib import Path

import pytest

from stdit.data.assignment import assign_clips
from stdit.data.buckets import Bucket
from stdit.data.clip_list import ClipList
from stdit.data.manifest.clips import Clips
from stdit.data.manifest.reading import read_manifest
from stdit.errors import UserError

BUCKETS = [Bucket(8, 16, 16, 8.0), Bucket(4, 8, 8, 8.0)]
ROWS = ["a.mp4,a cat,8,8,8,8", "b.mp4,a dog,8,8,8,8", "b.mp4,,8,8,8,8", "c.mp4,a bird,8,8,8,8"]


def listed(folder: Path, rows: list[str], buckets: list[Bucket] = BUCKETS) -> ClipList:
    folder.mkdir(exist_ok=True)
    manifest = folder / "clips.csv"
    manifest.write_text("\n".join(["path,text,num_frames,fps,height,width", *rows]))
    return ClipList.of(assign_clips(read_manifest(manifest)[0], buckets))


def test_a_list_is_read_as_it_was_written(tmp_path: Path) -> None:
    clips = listed(tmp_path, ROWS)
    file = tmp_path / "clips.gz"
    file.write_bytes(clips.to_bytes())
    found = ClipList.read(file)
    assert found.buckets == clips.buckets and (found.bucket == clips.bucket).all()
    assert list(found.clips.texts) == ["a cat", "a dog", "a bird"] and list(found.clips.row) == [1, 2, 4]
    assert clips.changes_since(found) == [
        "the order of the clips in the manifest"
    ]  # which is all that is left
    moved = listed(tmp_path / "moved", ROWS)
    assert moved.to_bytes() == clips.to_bytes()
    content = clips.to_bytes()
    for damaged in (b"", content[:-9], content[:40], b"no list"):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="is no list of clips"):
            ClipList.read(file)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*ROWS, "d.mp4,d,8,8,8,8"], ["3 -> 4 clips (new: row 5 (d.mp4))"]),
        (ROWS[1:], ["3 -> 2 clips (gone: row 1 (a.mp4))"]),
        (
            [f"{name}.mp4,{name},8,8,8,8" for name in "defgh"],
            ["3 -> 5 clips (new: row 1 (d.mp4), row 2 (e.mp4), row 3 (f.mp4) and 2 more; "
             "gone: row 1 (a.mp4), row 2 (b.mp4), row 4 (c.mp4))"],
        ),
        ([ROWS[0], "b.mp4,a mouse,8,8,8,8", *ROWS[2:]], ['caption of row 2 (b.mp4): "a dog" -> "a mouse"']),
        (
            [f"{row.split(',')[0]},x,8,8,8,8" for row in ROWS],
            ['3 -> 4 clips (new: row 3 (b.mp4))',
             'caption of row 1 (a.mp4): "a cat" -> "x", row 2 (b.mp4): "a dog" -> "x", '
             'row 4 (c.mp4): "a bird" -> "x"'],
        ),
        (
            ["a.mp4,a cat,9,8,16,16", *ROWS[1:]],
            ["bucket of row 1 (a.mp4): 4x8x8 at 8 fps -> 8x16x16 at 8 fps", "num_frames of row 1 (a.mp4): 8 -> 9",
             "height of row 1 (a.mp4): 8 -> 16", "width of row 1 (a.mp4): 8 -> 16"],
        ),
        ([*ROWS[::-1]], ["the order of the clips in the manifest"]),
    ],
)  # fmt: skip
def test_differences_in_words(tmp_path: Path, rows: list[str], words: list[str]) -> None:
    assert listed(tmp_path / "new", rows).changes_since(listed(tmp_path / "old", ROWS)) == words


def test_long_captions_are_cut_to_where_they_differ(tmp_path: Path) -> None:
    old, new = (f"a.mp4,{'very ' * 30}{animal} {'far ' * 30},8,8,8,8" for animal in ("long", "short"))
    (words,) = listed(tmp_path, [new]).changes_since(listed(tmp_path, [old]))
    assert len(words) < 200 and '"...' in words and "very long far" in words and "very short far" in words


def test_windows_of_a_clip_count_once_and_repeated_rows_are_told_apart(tmp_path: Path) -> None:
    buckets = [Bucket(4, 8, 8, 8.0, max_windows=4)]
    old = listed(tmp_path, ["a.mp4,one,16,8,8,8", "a.mp4,two,16,8,8,8"], buckets)
    new = listed(tmp_path, ["a.mp4,one,16,8,8,8", "a.mp4,three,16,8,8,8"], buckets)
    assert len(old.clips) == 8
    assert new.changes_since(old) == ['caption of row 2 (a.mp4): "two" -> "three"']


def test_a_large_list_is_compact(tmp_path: Path) -> None:
    clips = listed(tmp_path, [f"videos/{n:06d}.mp4,clip number {n} of many,8,8,8,8" for n in range(20_000)])
    assert len(clips.to_bytes()) < 12 * 20_000
    texts = list(clips.clips.texts)
    texts[11] = "mended"
    table = {
        name: getattr(clips.clips, name) for name in ("paths", "num_frames", "fps", "height", "width", "row")
    }
    mended = replace(clips, clips=Clips(texts=type(clips.clips.texts)(texts), **table))
    assert mended.changes_since(clips) == [
        'caption of row 12 (videos/000011.mp4): "clip number 11 of many" -> "mended"'
    ]
