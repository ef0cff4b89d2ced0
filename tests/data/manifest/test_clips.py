import pickle

import numpy as np
import pytest

from stdit.data.decoding.media import Media
from stdit.data.manifest.clips import Clip, Clips, Strings
from stdit.data.manifest.reading import read_manifest


def clip(location="/data/a/1.mp4", text="a cat", num_frames=16, fps=8.0, height=32, width=48, **rest):
    root = "/data" if location.startswith("/data/") else None
    return Clip(Media(location, root=root), text, num_frames, fps, height, width, **rest)


MADE = [
    clip(extra={"camera": "pan"}),
    Clip(Media("s3://b/1.tar", "猫.mp4", 512, 99, "s3://b"), "кошка 🐈\nthere", 9, 29.97, 240, 426,
         start=1.5, end=3.25, weight=0.5),
    clip("/free/3.mp4", "", 1, 1.0, 1, 1, extra={"motion": "0.3"}, weight=2.0),
]  # fmt: skip


def test_a_table_gives_the_clips_that_it_was_made_of():
    table = Clips.of(MADE)
    assert list(table) == MADE and table[-1] == MADE[2] and list(table[1:]) == MADE[1:]
    assert table[0].extra == {"camera": "pan", "motion": ""}
    assert table.seconds.tolist() == [clip.seconds for clip in MADE]
    assert list(pickle.loads(pickle.dumps(table))) == MADE
    with pytest.raises(IndexError):
        table[3]
    with pytest.raises(ValueError):
        table.weight[0] = 3.0


def test_concatenated_tables():
    parts = [Clips.of(MADE[:1]), Clips.of([]), Clips.of(MADE[1:])]
    both = Clips.concatenate(parts)
    assert list(both) == MADE
    assert [clip.extra for clip in both] == [clip.extra for clip in Clips.of(MADE)]
    assert list(both.take(np.array([2, 0, 0]))) == [MADE[2], MADE[0], MADE[0]]


def test_a_column_of_one_value_takes_no_memory():
    strings = Strings(map(str, range(100)))
    table = Clips(strings, strings, np.arange(1, 101), 8.0, 32, 32)
    joined = Clips.concatenate([table, table])
    for name in ("fps", "height", "start", "end", "weight"):
        assert getattr(joined, name).strides == (0,) and getattr(joined, name).shape == (200,)
    assert joined[150].num_frames == 51 and joined[150].end is None and joined[150].weight == 1


def test_strings_hold_any_text():
    texts = ["", "ascii", "naïve", "🐈", "lone \ud800 half", "a\0b"]
    strings = Strings(texts)
    assert list(strings) == texts and list(strings[::-2]) == texts[::-2]
    assert list(Strings.concatenate([strings, Strings(), strings])) == texts * 2


def content(clips, *places):
    return b"".join(clips.content(np.array(places)))


def test_content_is_that_of_the_clips_asked_for_and_not_of_where_they_lie():
    table = Clips.of(MADE)
    moved = Clip(Media("/more/a/1.mp4", root="/more"), "a cat", 16, 8.0, 32, 48)
    assert content(table, 0) == content(Clips.of([clip(text="else"), moved]), 1)
    for other in [
        clip(text="a ca"),
        clip(width=49),
        clip(weight=2.0),
        clip("/data/a/2.mp4"),
        clip(start=1.0),
    ]:
        assert content(Clips.of([other]), 0) != content(table, 0)


def test_complete_rows_are_read_without_accessing_their_files(tmp_path):
    rows = [f"videos/{i}.mp4,clip {i},{i + 1},8,32,{40 + i}" for i in range(5)]
    (tmp_path / "m.csv").write_text(
        "\n".join(["path,text,num_frames,fps,height,width", *rows, "../x.mp4,a,1,1,1,1"])
    )
    clips, skipped = read_manifest(tmp_path / "m.csv")
    assert [clip.media.name for clip in clips] == [f"videos/{i}.mp4" for i in range(5)]
    assert [(clip.text, clip.num_frames, clip.width) for clip in clips][4] == ("clip 4", 5, 44)
    assert [skip.reason.partition(" root")[0] for skip in skipped] == ["outside the data"]


def test_complete_and_probed_rows_keep_their_order(tmp_path, write_video):
    write_video(tmp_path / "p.mp4")
    rows = [
        "1.mp4,one,4,8,32,32",
        "p.mp4,two,,,,",
        f"{tmp_path.resolve()}/3.mp4,three,4,8,32,32",
        "no.mp4,four,,8,1,1",
    ]
    (tmp_path / "m.csv").write_text("\n".join(["path,text,num_frames,fps,height,width", *rows]))
    clips, skipped = read_manifest(tmp_path / "m.csv")
    assert [(clip.text, clip.num_frames) for clip in clips] == [("one", 4), ("two", 16), ("three", 4)]
    assert [clip.media.name for clip in clips] == ["1.mp4", "p.mp4", "3.mp4"]
    assert skipped == [("no.mp4", "file missing")]
