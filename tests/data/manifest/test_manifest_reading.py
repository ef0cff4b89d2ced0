import os
import pickle

import pytest
from PIL import Image

from stdit.data.decoding.decode import DecodeError
from stdit.data.decoding.media import Media
from stdit.data.manifest.reading import Clip, Skipped, read_manifest, summarise
from stdit.errors import UserError


def write_csv(folder, *rows, header="path,text", encoding="utf-8", newline="\n"):
    manifest = folder / "manifest.csv"
    manifest.write_bytes((newline.join([header, *rows]) + newline).encode(encoding))
    return manifest


def reasons(skipped):
    return {skip.path: skip.reason for skip in skipped}


@pytest.fixture
def video(tmp_path, write_video):
    return write_video(tmp_path / "a.mp4")


def test_missing_metadata_is_probed(tmp_path, video):
    clips, skipped = read_manifest(write_csv(tmp_path, 'a.mp4,"a red ball, rolling"'))
    assert list(clips) == [
        Clip(Media(str(video), root=str(tmp_path)), "a red ball, rolling", 16, 8.0, 32, 32)
    ]
    assert not skipped and clips[0].seconds == 2


def test_given_metadata_is_used_and_other_columns_are_kept(tmp_path, video):
    header = "path,text,num_frames,fps,height,width,camera"
    clips, _ = read_manifest(write_csv(tmp_path, "a.mp4,ball,12,4,30,40,pan", header=header))
    assert (clips[0].num_frames, clips[0].fps, clips[0].height, clips[0].width) == (12, 4.0, 30, 40)
    assert clips[0].extra == {"camera": "pan"}


@pytest.mark.parametrize(
    ("encoding", "newline"), [("utf-8-sig", "\n"), ("utf-8", "\r\n"), ("utf-8-sig", "\r\n")]
)
def test_byte_order_mark_and_windows_line_ends(tmp_path, video, encoding, newline):
    clips, _ = read_manifest(write_csv(tmp_path, "a.mp4,ball", encoding=encoding, newline=newline))
    assert clips[0].text == "ball"


def test_unicode_names_and_captions(tmp_path, write_video):
    write_video(tmp_path / "видео" / "猫 ü.mp4")
    clips, skipped = read_manifest(write_csv(tmp_path, 'видео/猫 ü.mp4,"кошка 🐈 ""hi""\nthere"'))
    assert not skipped and clips[0].text == 'кошка 🐈 "hi"\nthere' and clips[0].media.name == "видео/猫 ü.mp4"


def test_images_are_clips(tmp_path):
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    clips, _ = read_manifest(write_csv(tmp_path, "a.png,black"))
    assert (clips[0].num_frames, clips[0].height, clips[0].width) == (1, 32, 48)


def test_bad_entries_are_skipped_with_their_reasons(tmp_path, video):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    rows = [
        "a.mp4,ball",
        "missing.mp4,ball",
        "empty.mp4,ball",
        "text.mp4,ball",
        "concat.mp4,ball",
        "a.mp4,",
        ",ball",
    ]
    clips, skipped = read_manifest(write_csv(tmp_path, *rows, "b.mp4,a red ball, rolling"))
    assert len(clips) == 1
    found = reasons(skipped)
    assert found["missing.mp4"] == "file missing"
    assert found["empty.mp4"] == "cannot be read: is empty (0 bytes)"
    assert found["text.mp4"].startswith("cannot be read: not a readable video")
    assert found["concat.mp4"].startswith("cannot be read: not a video in a supported format")
    assert found["a.mp4"] == "caption missing"
    assert found["(no path)"] == "path missing"
    assert found["b.mp4"].startswith("malformed row: line 9") and "quote" in found["b.mp4"]


def test_the_content_of_a_file_decides_and_not_its_name(tmp_path, video):
    (tmp_path / "page.mp4").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>" * 50)
    (tmp_path / "page.png").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    Image.new("RGB", (48, 32)).save(tmp_path / "photo.png")
    (tmp_path / "photo.png").rename(tmp_path / "photo.mp4")
    (tmp_path / "clip.jpg").write_bytes(video.read_bytes())
    names = ["a.mp4", "page.mp4", "page.png", "photo.mp4", "clip.jpg"]
    clips, skipped = read_manifest(write_csv(tmp_path, *(f"{name},ball" for name in names)))
    assert [clip.num_frames for clip in clips] == [16, 1, 16]
    assert [skip.path for skip in skipped] == ["page.mp4", "page.png"]
    assert all(skip.reason.startswith("cannot be read: not a ") for skip in skipped)


def test_long_and_odd_captions_are_unchanged(tmp_path, video):
    long = "words, " * 1428 + "end."
    rows = [f'a.mp4,"{long}"', 'a.mp4,"two\r\nlines, ""quoted"""']
    clips, skipped = read_manifest(write_csv(tmp_path, *rows, newline="\r\n"))
    assert [clip.text for clip in clips] == [long, 'two\r\nlines, "quoted"'] and len(long) == 10_000
    assert not skipped


@pytest.mark.parametrize("value", ["abc", "0", "-3", "nan", "inf", "2.5"])
def test_impossible_numbers_skip_the_row(tmp_path, video, value):
    manifest = write_csv(tmp_path, f"a.mp4,ball,{value}", "a.mp4,ball,16", header="path,text,num_frames")
    clips, skipped = read_manifest(manifest)
    assert len(clips) == 1 and value in skipped[0].reason and "num_frames" in skipped[0].reason


def test_nothing_outside_the_root_is_opened(tmp_path, write_video):
    outside = write_video(tmp_path / "secret.mp4")
    root = tmp_path / "data"
    write_video(root / "in.mp4")
    os.symlink(outside, root / "link.mp4")
    os.symlink(tmp_path, root / "up")
    os.symlink(root / "in.mp4", root / "inner.mp4")
    inside = [root / "in.mp4", "in.mp4", "inner.mp4", "x/../in.mp4"]
    beyond = ["../secret.mp4", "link.mp4", "up/secret.mp4", str(outside), "x\0.mp4", "n" * 5000]
    clips, skipped = read_manifest(write_csv(root, *(f"{path},ball" for path in [*inside, *beyond])))
    assert len(clips) == len(inside) and {clip.media.local_path() for clip in clips} == {str(root / "in.mp4")}
    assert len(skipped) == len(beyond)
    for skip in skipped[:4]:
        assert skip.reason.startswith("outside the data root")


def test_root_may_be_elsewhere(tmp_path, write_video):
    write_video(tmp_path / "videos" / "a.mp4")
    clips, _ = read_manifest(write_csv(tmp_path, "a.mp4,ball"), tmp_path / "videos")
    assert len(clips) == 1


def test_folder_of_videos_with_captions(tmp_path, write_video):
    write_video(tmp_path / "b" / "one.mp4")
    write_video(tmp_path / "two.mp4")
    (tmp_path / "b" / "one.txt").write_text("a cat\n")
    clips, skipped = read_manifest(tmp_path)
    assert [clip.text for clip in clips] == ["a cat"]
    assert [skip.reason for skip in skipped] == ["caption missing"]
    (tmp_path / "two.txt").write_bytes(b"ein B\xe4r")
    _, skipped = read_manifest(tmp_path)
    assert len(skipped) == 1 and skipped[0].reason.startswith("caption file cannot be read: two.txt: 'utf-8'")


def test_unusable_manifests_say_why(tmp_path, video):
    def message(manifest):
        with pytest.raises(UserError) as caught:
            read_manifest(manifest)
        return str(caught.value)

    assert "does not exist" in message(tmp_path / "nothing.csv")
    (tmp_path / "empty.csv").write_text("")
    assert "is empty" in message(tmp_path / "empty.csv")
    assert "lists no clips" in message(write_csv(tmp_path))
    assert "no column 'text'; it has path, caption" in message(
        write_csv(tmp_path, "a,b", header="path,caption")
    )
    assert "no column 'path'" in message(write_csv(tmp_path, "a.mp4,b", header="file,text"))
    (tmp_path / "latin.csv").write_bytes("path,text\na.mp4,Stra\xdfe\n".encode("latin-1"))
    assert "not UTF-8" in message(tmp_path / "latin.csv")
    assert "quotes" in message(write_csv(tmp_path, 'a.mp4,"never closed'))
    (tmp_path / "none").mkdir()
    assert "lists no clips" in message(tmp_path / "none")
    assert "1 x file missing: gone.mp4" in message(write_csv(tmp_path, "gone.mp4,ball"))


def test_summary_counts_by_kind():
    skipped = [Skipped(f"{i}.mp4", f"too short: {i} frames") for i in range(3)] + [
        Skipped("x", "file missing")
    ]
    assert summarise(skipped) == [
        "  3 x too short: 0.mp4 (0 frames), 1.mp4 (1 frames), ...",
        "  1 x file missing: x",
    ]


def test_errors_and_clips_cross_processes(tmp_path):
    error = pickle.loads(pickle.dumps(DecodeError(tmp_path, "why")))
    assert (error.path, error.reason) == (str(tmp_path), "why")
    clip = Clip(Media(str(tmp_path)), "a", 1, 1.0, 2, 2, extra={"x": "y"})
    assert pickle.loads(pickle.dumps(clip)) == clip
