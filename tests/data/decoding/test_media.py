import os
import pickle

import fsspec
import pytest
import torch

from stdit.data.decoding.decode import DecodeError, decode_clip, probe
from stdit.data.decoding.media import Media


@pytest.fixture
def video(tmp_path, write_video):
    return write_video(tmp_path / "data" / "a.mp4")


def packed(video, before=b"x" * 1000, after=b"y" * 500):
    """A file that holds the video between other bytes, and where."""
    content = video.read_bytes()
    archive = video.with_name("archive.bin")
    archive.write_bytes(before + content + after)
    return archive, len(before), len(content)


def test_a_range_of_a_local_or_remote_file_reads_as_the_file(video):
    archive, offset, size = packed(video)
    fsspec.filesystem("memory").pipe("/bucket/archive.bin", archive.read_bytes())
    frames = decode_clip(video, 8, 8, 32, 32, start=0.5)
    for location in (str(archive), "memory://bucket/archive.bin"):
        media = pickle.loads(pickle.dumps(Media(location, "a.mp4", offset, size)))
        assert probe(media) == probe(video)
        assert torch.equal(decode_clip(media, 8, 8, 32, 32, start=0.5), frames)
        with media.open() as file:
            assert file.read() == video.read_bytes()
            assert file.seek(-3, os.SEEK_END) == size - 3 and len(file.read(10)) == 3


def test_a_whole_remote_file(video):
    fsspec.filesystem("memory").pipe("/bucket/whole.mp4", video.read_bytes())
    assert probe(Media("memory://bucket/whole.mp4")) == probe(video)


def test_a_link_that_leaves_the_root_is_not_followed_when_a_clip_is_opened(tmp_path, video, write_video):
    outside = write_video(tmp_path / "secret.mp4")
    media = Media(str(video), root=str(video.parent))
    assert probe(media).num_frames == 16
    video.unlink()
    video.symlink_to(outside)
    for read in (probe, lambda media: decode_clip(media, 1, 8, 16, 16), Media.state):
        with pytest.raises((DecodeError, OSError), match="outside the data root"):
            read(media)


def test_errors_of_opening_state_the_reason(tmp_path, video):
    def reason(media):
        with pytest.raises(DecodeError) as caught:
            probe(media)
        return caught.value.reason

    archive, offset, size = packed(video, after=b"")
    assert reason(Media(str(tmp_path / "gone.mp4"))) == "file missing"
    assert reason(Media(str(tmp_path / "gone.png"))) == "file missing"
    assert reason(Media(str(tmp_path))) == "file missing"
    assert reason(Media(str(archive), "a.mp4", offset, 0)) == "is empty (0 bytes)"
    assert reason(Media(str(archive), "a.mp4", offset, size + 1)).endswith("archive.bin is cut short")
    assert reason(Media("memory://bucket/nothere.mp4")) == "file missing"
    assert "Protocol not known" in reason(Media("nonsense://bucket/a.mp4"))


def test_names_do_not_depend_on_the_root_and_contain_no_secrets():
    for root in ("/one", "/two/deep"):
        assert Media(f"{root}/b/a.mp4", root=root).name == "b/a.mp4"
        assert Media(f"{root}/b.tar", "x/a.MP4", 512, 9, root).name == "b.tar/x/a.MP4"
    signed = Media(
        "https://user:word@host/b/a.tar?signature=abc", "x.mp4", 512, 9, "https://user:word@host/b"
    )
    assert str(signed) == "https://host/b/a.tar/x.mp4" and signed.name == "a.tar/x.mp4"
    assert Media("https://host/a.MP4?signature=abc").suffix == Media("/b.tar", "x/a.MP4").suffix == ".mp4"


def test_the_state_changes_with_the_bytes(video):
    media = Media(str(video), root=str(video.parent))
    before = media.state()
    assert media.state() == before
    os.utime(video, ns=(1, 1))
    assert media.state() != before
    assert Media(str(video), "a", 0, 5).state() != Media(str(video), "a", 5, 5).state()
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/state.mp4", b"12345")
    before = Media("memory://bucket/state.mp4").state()
    memory.pipe("/bucket/state.mp4", b"54321")
    assert Media("memory://bucket/state.mp4").state() != before
