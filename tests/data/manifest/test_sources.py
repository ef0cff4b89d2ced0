"""Clips from several sources, of any format, down to the frames that they give."""

import json
import shutil
import tarfile

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import torch

from stdit.data.build import build_plan
from stdit.data.clip_tensors import to_video
from stdit.data.config import BucketConfig, DataConfig, SourceConfig
from stdit.data.dataset import video_loader
from stdit.data.decoding.decode import decode_clip
from stdit.data.manifest.reading import clip_warnings, read_manifest, read_sources
from stdit.errors import UserError

COMPLETE = "num_frames,fps,height,width"


@pytest.fixture
def video(tmp_path, write_video):
    return write_video(tmp_path / "a.mp4", num_frames=16, fps=8)


def write_csv(path, header, *rows):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def reasons(skipped):
    return {skip.path: skip.reason for skip in skipped}


def make_shard(path, *files):
    with tarfile.open(path, "w") as archive:
        for file in files:
            archive.add(file, file.name)
    return path


def levels(frames):
    """Which frame of `grey_frames` each frame [T 3 H W] is."""
    return (frames.float().mean(dim=(1, 2, 3)) / 10).round().int().tolist()


def test_a_clip_is_the_same_from_every_format(tmp_path, video, write_video):
    facts = {
        "path": "a.mp4",
        "text": "a ball",
        "num_frames": 16,
        "fps": 8.0,
        "height": 32,
        "width": 32,
        "motion": 5,
    }
    (tmp_path / "m.jsonl").write_text(json.dumps(facts))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([facts]), tmp_path / "m.parquet")
    write_csv(tmp_path / "m.csv", ",".join(facts), ",".join(map(str, facts.values())))
    (tmp_path / "a.json").write_text(json.dumps({"text": "no", **facts}))
    (tmp_path / "a.txt").write_text("a ball")
    shard = make_shard(tmp_path / "0.tar", tmp_path / "a.txt", video, tmp_path / "a.json")
    expected = decode_clip(video, 4, 8, 32, 32, start=0.5)
    for manifest in ("m.jsonl", "m.parquet", "m.csv", "0.tar"):
        clips, skipped = read_manifest(tmp_path / manifest)
        (clip,) = clips
        assert not skipped
        assert (clip.text, clip.num_frames, clip.fps, clip.height, clip.width) == ("a ball", 16, 8.0, 32, 32)
        assert clip.extra["motion"].startswith("5")
        assert torch.equal(decode_clip(clip.media, 4, 8, 32, 32, start=0.5), expected)
    assert clip.media.location == str(shard) and clip.media.name == "0.tar/a.mp4"


def test_files_of_complete_rows_are_not_accessed(tmp_path):
    rows = ["gone.mp4,ball,16,8,32,32", "sub/../x.mp4,ball,16,8,32,32", "../up.mp4,ball,16,8,32,32"]
    clips, skipped = read_manifest(write_csv(tmp_path / "m.csv", f"path,text,{COMPLETE}", *rows))
    assert [clip.media.name for clip in clips] == ["gone.mp4", "x.mp4"]
    assert skipped[0].path == "../up.mp4" and skipped[0].reason.startswith("outside the data root")


@pytest.mark.parametrize("header", ["path,text,start,end", f"path,text,start,end,{COMPLETE}"])
def test_start_and_end_cut_a_part_out(tmp_path, video, header):
    facts = ",16,8,32,32" if COMPLETE in header else ""
    windows = {"0.5,1.5": (0.5, 8), "1,": (1.0, 8), ",0.5": (0.0, 4), ",": (0.0, 16), "0.55,1.5": (0.55, 7)}
    windows |= {"1.5,99": (1.5, 4), "0.5,0.51": (0.5, 1)}
    bad = {
        "2,": "start",
        "9,10": "start",
        "1.5,1": "end",
        "1,1": "end",
        "-1,1": "start",
        "a,1": "start",
        "1,nan": "end",
    }
    rows = [f"a.mp4,ball,{window}{facts}" for window in (*windows, *bad)]
    clips, skipped = read_manifest(write_csv(tmp_path / "m.csv", header, *rows))
    assert [(clip.start, clip.num_frames) for clip in clips] == list(windows.values())
    assert [skip.reason.split()[0] for skip in skipped] == list(bad.values())


def test_training_sees_the_part_alone(tmp_path, video):
    manifest = write_csv(
        tmp_path / "m.csv", "path,text,start,end", "a.mp4,ball,0.5,1.25", "a.mp4,ball,1.25,2"
    )
    buckets = [BucketConfig(num_frames=4, fps=8, height=32, width=32, batch_size=2)]
    plan = build_plan(DataConfig(manifest=str(manifest), buckets=buckets))
    parts = [set(range(4, 10)), set(range(10, 16))]
    starts = set()
    for raw in video_loader(plan)(0, 12):
        for clip, frames in zip(raw.info.clip_indices.tolist(), to_video(raw.content), strict=True):
            shown = levels((frames.transpose(0, 1) + 1) * 127.5)
            assert set(shown) <= parts[clip]
            starts.add(shown[0])
    assert len(starts) > 4, "windows vary within their part"
    buckets = [BucketConfig(num_frames=7, fps=8, height=32, width=32)]
    with pytest.raises(UserError, match="2 x too short: .*6 frames at 8 fps"):
        build_plan(DataConfig(manifest=str(manifest), buckets=buckets))


@pytest.mark.parametrize("remote", [False, True])
def test_training_from_shards(tmp_path, write_video, remote):
    folder = tmp_path / "files"
    for i in range(4):
        write_video(folder / f"{i}.mp4", num_frames=6, fps=8)
        (folder / f"{i}.txt").write_text(f"ball {i}")
    for s in range(2):
        make_shard(
            tmp_path / f"{s}.tar",
            *(folder / f"{i}.{kind}" for i in (2 * s, 2 * s + 1) for kind in ("mp4", "txt")),
        )
    buckets = [BucketConfig(num_frames=4, fps=8, height=32, width=32, batch_size=4)]
    for s in range(2):
        fsspec.filesystem("memory").pipe(f"/shards/{s}.tar", (tmp_path / f"{s}.tar").read_bytes())
    where = "memory://shards" if remote else str(tmp_path)
    sharded = build_plan(DataConfig(manifest=where + "/{0..1}.tar", buckets=buckets))
    plain = build_plan(DataConfig(manifest=str(folder), buckets=buckets))
    for one, other in zip(
        video_loader(sharded, workers=int(not remote))(0, 2), video_loader(plain)(0, 2), strict=True
    ):
        assert one.info.captions == other.info.captions and torch.equal(one.content, other.content)


def test_a_file_that_vanishes_after_planning_is_replaced_and_counted(tmp_path, write_video):
    for name in "abc":
        write_video(tmp_path / f"{name}.mp4", num_frames=6, fps=8)
    write_video(tmp_path / "outside" / "d.mp4", num_frames=6, fps=8)
    root = tmp_path / "data"
    root.mkdir()
    rows = [f"{name}.mp4,ball,6,8,32,32" for name in "abc"]
    for name in "abc":
        shutil.move(tmp_path / f"{name}.mp4", root)
    manifest = write_csv(root / "m.csv", f"path,text,{COMPLETE}", *rows)
    buckets = [BucketConfig(num_frames=4, fps=8, height=32, width=32, batch_size=3)]
    plan = build_plan(DataConfig(manifest=str(manifest), buckets=buckets))
    (root / "a.mp4").unlink()
    (root / "b.mp4").unlink()
    (root / "b.mp4").symlink_to(tmp_path / "outside" / "d.mp4")
    batches = video_loader(plan)
    (raw,) = batches(0, 1)
    assert raw.info.clip_indices.tolist() == [2, 2, 2] and raw.replaced == 2
    failed = {path.rpartition("/")[2]: reason for path, reason in batches.tally.failed.items()}
    assert failed["a.mp4"] == "file missing" and failed["b.mp4"].startswith("outside the data root")


def test_several_sources_with_weights(tmp_path, write_video):
    files = ["one/a.mp4", "two/a.mp4", "two/b.mp4"]
    for name in files:
        write_video(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("cube")
    write_csv(tmp_path / "one" / "m.csv", "path,text,aesthetic", "a.mp4,ball,6.54")
    config = DataConfig(
        sources=[
            SourceConfig(manifest=str(tmp_path / "one" / "m.csv"), weight=2),
            SourceConfig(manifest=str(tmp_path / "two"), weight=0.5),
        ],
        caption_scores=["aesthetic", "camera"],
    )
    config.validate()
    clips, skipped = read_sources(config.sources, config.caption_scores)
    assert [clip.text for clip in clips] == ["ball aesthetic score: 6.5.", "cube", "cube"] and not skipped
    assert [clip.media.location for clip in clips] == [str(tmp_path / name) for name in files]
    assert [clip.weight for clip in clips] == [2, 0.5, 0.5]
    config.buckets = [BucketConfig(num_frames=4, fps=8, height=32, width=32)]
    plan = build_plan(config)
    drawn = [plan.batch(step).indices[0] for step in range(4 * plan.steps_per_epoch)]
    assert drawn.count(0) == 8 and drawn.count(1) + drawn.count(2) == 4, "in four epochs"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "data.manifest is empty"),
        ({"manifest": "a.csv", "sources": [{"manifest": "b.csv"}]}, "data.manifest beside data.sources"),
        ({"root": "a", "sources": [{"manifest": "b.csv"}]}, "data.root beside data.sources"),
        ({"sources": [{}]}, "data.sources: manifest is empty"),
        ({"sources": [{"manifest": "b.csv", "weight": 0}]}, "weight is 0 for b.csv"),
        ({"sources": [{"manifest": "b.csv", "weight": float("nan")}]}, "weight is nan"),
    ],
)
def test_impossible_sources_are_named(values, message):
    sources = [SourceConfig(**source) for source in values.pop("sources", [])]
    with pytest.raises(UserError, match=message):
        DataConfig(**values, sources=sources).validate()


def test_warnings_about_duplicates_and_misspelt_columns(tmp_path, video):
    rows = ["a.mp4,ball,1", "a.mp4,ball,1", "a.mp4,cube,1"]
    clips, _ = read_manifest(write_csv(tmp_path / "m.csv", "path,text,heigth", *rows))
    assert clip_warnings(clips) == [
        "1 of 3 clips repeat the caption of an earlier one",
        f"2 clips are listed again: {video}, {video}",
        "column 'heigth' is not read: is it meant to be 'height'?",
    ]
    assert clip_warnings(clips[2:])[:-1] == []
    buckets = [BucketConfig(num_frames=4, fps=8, height=32, width=32)]
    report = build_plan(DataConfig(manifest=str(tmp_path / "m.csv"), buckets=buckets)).report()
    assert all(line in report for line in clip_warnings(clips))


def test_the_cache_is_beside_the_first_source(tmp_path):
    def folder(**values):
        return DataConfig(**values).cache_folder().as_posix()

    (tmp_path / "set").mkdir()
    assert folder(manifest="a.csv") == "stdit-cache" and folder(manifest="b/a.csv") == "b/stdit-cache"
    assert folder(manifest=f"{tmp_path}/set") == f"{tmp_path}/set/stdit-cache"
    assert folder(manifest=f"{tmp_path}/set/{{0..9}}/*.tar") == f"{tmp_path}/set/stdit-cache"
    assert folder(sources=[SourceConfig("b/a.csv"), SourceConfig("c/a.csv")]) == "b/stdit-cache"


def test_rows_with_positions_in_archives(tmp_path, video):
    shard = make_shard(tmp_path / "0.tar", video)
    (tmp_path / "a.txt").write_text("a ball")
    ((clip,), _) = read_manifest(make_shard(tmp_path / "1.tar", video, tmp_path / "a.txt"))
    place = f"a.mp4,{clip.media.offset},{clip.media.size}"
    rows = [
        f"0.tar,ball,{place}",
        "0.tar,ball,a.mp4,,",
        "0.tar,ball,,0,5",
        "0.tar,ball,a.mp4,0,0",
        "0.tar,ball,a.mp4,0,9",
    ]
    clips, skipped = read_manifest(write_csv(tmp_path / "m.csv", "path,text,member,offset,size", *rows))
    assert [(one.media.location, one.media.member) for one in clips] == [(str(shard), "a.mp4")]
    assert torch.equal(decode_clip(clips[0].media, 2, 8, 32, 32), decode_clip(video, 2, 8, 32, 32))
    assert [skip.path for skip in skipped] == ["0.tar/a.mp4", "0.tar", "0.tar/a.mp4", "0.tar/a.mp4"]
    assert [skip.reason.split(":")[0] for skip in skipped] == [
        "member, offset and size",
        "member, offset and size",
        "size is not a whole number above 0",
        "cannot be read",
    ]


def test_videos_below_a_remote_root(tmp_path, video):
    fsspec.filesystem("memory").pipe("/videos/b/a.mp4", video.read_bytes())
    rows = [
        "b/a.mp4,ball",
        "memory://videos/b/a.mp4,ball",
        "gone.mp4,ball",
        "../a.mp4,ball",
        "memory://other/a.mp4,x",
    ]
    manifest = write_csv(tmp_path / "m.csv", "path,text", *rows)
    clips, skipped = read_manifest(manifest, "memory://videos")
    assert [clip.media.name for clip in clips] == ["b/a.mp4", "b/a.mp4"] and clips[0].num_frames == 16
    found = reasons(skipped)
    assert found["gone.mp4"] == "cannot be read: file missing"
    assert found["../a.mp4"].startswith("outside") and found["memory://other/a.mp4"].startswith("outside")
    assert read_manifest(write_csv(tmp_path / "m.csv", "path,text", "a.mp4,x", rows[1]))[1][0].reason == (
        f"outside the data root {tmp_path}, where no file is opened: a URL needs one as data.root"
    )
    with pytest.raises(UserError, match="only tar shards are read from a URL"):
        read_manifest("memory://videos/m.csv")


def test_shards_are_not_hashed_for_the_index(tmp_path, video, monkeypatch):
    (tmp_path / "a.txt").write_text("a ball")
    shard = make_shard(tmp_path / "0.tar", video, tmp_path / "a.txt")
    monkeypatch.setattr(
        "stdit.data.manifest.reading.manifest_key", lambda *_: pytest.fail("hashes the shard")
    )
    clips, _ = read_manifest(shard, index=tmp_path / "index.safetensors")
    assert len(clips) == 1


def test_a_folder_of_shards_is_an_error_with_the_right_pattern(tmp_path):
    make_shard(tmp_path / "0.tar")
    with pytest.raises(UserError, match=r"to train on its tar shards, name them: .*/\*\.tar"):
        read_manifest(tmp_path)
