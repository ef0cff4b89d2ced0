import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stdit.serve.errors import RequestError
from stdit.serve.gallery import gallery_index
from stdit.serve.gallery.gallery import Gallery
from stdit.serve.gallery.gallery_scan import checkpoint_name, read_facts
from tests.serve.small_videos import SmallVideos
from tests.waiting import seconds_left, wait_for


@pytest.fixture
def videos(tmp_path: Path) -> SmallVideos:
    return SmallVideos(tmp_path / "outputs")


@pytest.fixture
def gallery(tmp_path: Path) -> Gallery:
    return Gallery(tmp_path / "outputs", tmp_path / "state" / "gallery.sqlite")


def names(gallery: Gallery, **filters: str) -> list[str]:
    """All names, page by page."""
    found, before = [], None
    while True:
        page = gallery.page(3, before, **filters)
        found += [video.name for video in page.data]
        if page.next is None:
            return found
        before = page.next


def test_the_gallery_and_its_thumbnails_need_no_torch(videos: SmallVideos, tmp_path: Path) -> None:
    code = (
        "from stdit.serve.gallery import gallery_api, thumbnails; import sys; from pathlib import Path\n"
        f"thumbnails.thumbnail(Path({str(videos.make('a.mp4'))!r}), Path({str(tmp_path)!r}))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_videos_are_listed_newest_first_page_by_page(videos: SmallVideos, gallery: Gallery) -> None:
    made = [videos.make(name) for name in ("0.mp4", "run/videos/1.mp4", "2.mp4", "a/b/3.mp4", "a/4.mp4")]
    assert names(gallery) == [path.name for path in reversed(made)]
    page = gallery.page()
    assert page.total == 5 and page.next is None
    first = page.data[1]
    assert (first.folder, first.prompt, first.seed) == ("a/b", "a red circle", 0)
    assert (first.width, first.height, first.num_frames, first.fps, first.seconds) == (32, 16, 3, 8.0, 0.375)
    assert first.bytes == made[3].stat().st_size and first.created == made[3].stat().st_mtime
    assert gallery.find(first.id) == made[3]


def test_videos_of_one_time_are_each_listed_once(videos: SmallVideos, gallery: Gallery) -> None:
    for number in range(8):
        os.utime(videos.make(f"{number}.mp4"), ns=(10**18, 10**18))
    assert sorted(names(gallery)) == [f"{number}.mp4" for number in range(8)]


def test_changes_of_the_folder_are_seen(videos: SmallVideos, gallery: Gallery) -> None:
    videos.make("old/one.mp4", "before")
    two = videos.make("two.mp4")
    assert names(gallery) == ["two.mp4", "one.mp4"]
    two.unlink()
    videos.make("old/one.mp4", "after")
    videos.make("three.mp4")
    gallery.expire()
    assert [(video.name, video.prompt) for video in gallery.page().data][1:] == [("one.mp4", "after")]
    os.rename(videos.folder / "old", videos.folder / "new")
    gallery.expire()
    assert [video.folder for video in gallery.page().data] == ["", "new"]


def test_a_video_that_the_server_has_just_made_is_listed_at_once(videos: SmallVideos, tmp_path: Path) -> None:
    made = [0]
    gallery = Gallery(videos.folder, tmp_path / "of-server.sqlite", changes=lambda: made[0])
    videos.make("a.mp4")
    assert names(gallery) == ["a.mp4"]
    videos.make("b.mp4")
    made[0] += 1
    assert names(gallery) == ["b.mp4", "a.mp4"]


def test_a_file_is_read_once(
    videos: SmallVideos, gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos.make("one.mp4")
    gallery.refresh()
    monkeypatch.setattr(gallery_index, "read_facts", lambda _: pytest.fail("read again"))
    again = Gallery(videos.folder, tmp_path / "state" / "gallery.sqlite")
    again.refresh()
    assert names(again) == ["one.mp4"]


def test_a_page_of_a_cold_index_reads_only_what_it_shows(
    videos: SmallVideos, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(300):
        videos.make(f"{number % 7}/{number:04d}.mp4", f"prompt {number}")
    for number in range(5):
        videos.make_raw(f"foreign{number}.mp4", "{}")  # the newest, but none of ours
    read: list[str] = []
    monkeypatch.setattr(gallery_index, "read_facts", lambda path: read.append(path.name) or read_facts(path))
    monkeypatch.setattr(gallery.index, "read_unread", lambda *_: False)  # the thread
    page = gallery.page(48)
    assert [video.name for video in page.data] == [f"{number:04d}.mp4" for number in range(299, 251, -1)]
    assert len(read) == 48 + 1 + 5 and page.indexing and page.total == 300
    following = gallery.page(48, page.next)
    assert [video.name for video in following.data] == [f"{number:04d}.mp4" for number in range(251, 203, -1)]
    monkeypatch.undo()
    gallery.refresh()
    assert gallery.page(search="prompt 17").total == 13 and not gallery.page().indexing


def test_a_page_ends_before_a_file_that_is_not_read_yet(
    videos: SmallVideos, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk so slow that not all files are read in time leaves no gaps."""
    for number in range(6):
        videos.make(f"{number}.mp4")
    monkeypatch.setattr(gallery.index, "read_unread", lambda *_: False)
    monkeypatch.setattr(gallery.index, "read_newest", lambda *_: None)
    page = gallery.page(3)
    assert page.data == [] and page.next is None and page.indexing and page.total == 6
    with gallery.index.opened() as index:
        GalleryIndexRead(gallery).newest(index, 2)
    page = gallery.page(3)
    assert [video.name for video in page.data] == ["5.mp4", "4.mp4"] and page.next
    monkeypatch.undo()
    assert [video.name for video in gallery.page(3, page.next).data] == ["3.mp4", "2.mp4", "1.mp4"]


class GalleryIndexRead:
    """Read some files, though the test has switched it off."""

    def __init__(self, gallery: Gallery) -> None:
        self.index = gallery.index

    def newest(self, index: sqlite3.Connection, count: int) -> None:
        gallery_index.GalleryIndex.read_unread(self.index, index, count)


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("RED", ["2.mp4", "0.mp4"]),
        ("circle  red", ["0.mp4"]),
        ("ed ci", ["0.mp4"]),
        ("50%", ["1.mp4"]),
        ("%", ["1.mp4"]),
        ("_", []),
        ("*", []),
        ('" OR 1', []),
        ("GRÜSSE", ["3.mp4"]),
        ("红", ["4.mp4"]),
        ("\udc80", []),
        ("", ["4.mp4", "3.mp4", "2.mp4", "1.mp4", "0.mp4"]),
    ],
)
def test_search_finds_all_words_anywhere_in_prompts(
    videos: SmallVideos, gallery: Gallery, search: str, found: list[str]
) -> None:
    prompts = ["A red circle", "50% grey", "Reddish", "Viele Grüße", "一个红色的圆"]
    for number, prompt in enumerate(prompts):
        videos.make(f"{number}.mp4", prompt)
    gallery.refresh()
    assert names(gallery, search=search) == found


def test_videos_are_filtered_by_checkpoint(videos: SmallVideos, gallery: Gallery) -> None:
    videos.make("0.mp4", checkpoint="outputs/quickstart/pipeline")
    videos.make("1.mp4", checkpoint="/disk/runs/other/checkpoints/step-00000100", checkpoint_step=100)
    videos.make("2.mp4", "blue", checkpoint="/disk/quickstart/pipeline/")
    gallery.refresh()
    assert gallery.page().checkpoints == ["other", "quickstart"]
    assert names(gallery, checkpoint="quickstart") == ["2.mp4", "0.mp4"]
    assert names(gallery, checkpoint="quickstart", search="blue") == ["2.mp4"]
    assert names(gallery, checkpoint="q%") == []
    assert gallery.page(checkpoint="other").data[0].checkpoint_step == 100


def test_names_of_checkpoints() -> None:
    found = [
        checkpoint_name(path) for path in ("a/stdit/bundled", "C:\\runs\\x\\pipeline", "pipeline", "", "/")
    ]
    assert found == ["bundled", "x", "pipeline", "?", "?"]


def test_what_is_no_video_of_ours_is_not_shown(videos: SmallVideos, gallery: Gallery, tmp_path: Path) -> None:
    videos.make("shown.mp4")
    for hidden in (".a.mp4", ".cache/b.mp4", "run/samples.tmp/c.mp4", "d.mp4.tmp"):
        videos.make(hidden)
    videos.make("run/samples/step-00000100/00-e.mp4")
    videos.make_raw("foreign.mp4", '{"title": "a film"}')
    videos.make_raw("list.mp4", "[1, 2]")
    (videos.folder / "damaged.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(1000))
    (videos.folder / "empty.mp4").touch()
    (videos.folder / "folder.mp4").mkdir()
    os.mkfifo(videos.folder / "pipe.mp4")
    secret = SmallVideos(tmp_path / "secret").make("secret.mp4")
    (videos.folder / "link.mp4").symlink_to(secret)
    (videos.folder / "links").symlink_to(secret.parent)
    (videos.folder / "loop").symlink_to(videos.folder)
    os.rename(videos.make("x.mp4"), os.fsencode(videos.folder) + b"/\xff.mp4")
    gallery.refresh()
    assert names(gallery) == ["shown.mp4"]
    with_validation = Gallery(videos.folder, tmp_path / "other.sqlite", validation=True)
    with_validation.refresh()
    assert names(with_validation) == ["00-e.mp4", "shown.mp4"]


@pytest.mark.parametrize(
    "comment",
    [
        "",
        "{",
        '{"prompt": 3}',
        '{"prompt": null}',
        "[" * 590,
        '{"prompt": "' + "x" * 500,
    ],
)
def test_comments_that_are_not_ours(videos: SmallVideos, comment: str) -> None:
    assert read_facts(videos.make_raw("a.mp4", comment)) is None


def test_strange_metadata_are_left_out(videos: SmallVideos, gallery: Gallery) -> None:
    comment = (
        '{"prompt": "half \\ud800 a pair \\u0000", "seed": 99999999999999999999, "fps": NaN, "width": true,'
        ' "height": "16", "num_frames": -1e999, "checkpoint": ["a"], "checkpoint_step": {}}'
    )
    videos.make_raw("a.mp4", comment)
    video = gallery.page().data[0]
    assert video.prompt == "half ? a pair \0"
    assert {video.seed, video.fps, video.width, video.height, video.num_frames, video.seconds} == {None}
    assert video.checkpoint is None and video.checkpoint_step is None


@pytest.mark.parametrize(
    "before", ["", "1", "1-", "-", "1-2-3", "9" * 19 + "-1", "1-٣", "a-b", "1-2;DROP TABLE"]
)
def test_a_cursor_that_is_none_is_refused(gallery: Gallery, before: str) -> None:
    with pytest.raises(RequestError, match="before = .*: must be what `next` of the page before says"):
        gallery.page(before=before)


def test_too_many_words_are_refused(gallery: Gallery) -> None:
    with pytest.raises(RequestError, match="search has 21 words: at most 20"):
        gallery.page(search="a " * 21)


@pytest.mark.parametrize("key", ["", "x", "../../etc/passwd", "0" * 24, "0" * 23 + "\0", "ｆ" * 24, "\udc80"])
def test_an_unknown_id_is_not_found(videos: SmallVideos, gallery: Gallery, key: str) -> None:
    videos.make("a.mp4")
    gallery.refresh()
    with pytest.raises(RequestError, match="there is no such video in the gallery") as error:
        gallery.find(key)
    assert error.value.status == 404


def test_a_video_that_became_a_link_or_vanished_is_not_served(
    videos: SmallVideos, gallery: Gallery, tmp_path: Path
) -> None:
    secret = SmallVideos(tmp_path / "secret").make("secret.mp4")
    video = videos.make("folder/a.mp4")
    key = gallery.page().data[0].id
    video.unlink()
    for target in (None, secret, tmp_path / "nothing"):
        if target is not None:
            video.symlink_to(target)
        with pytest.raises(RequestError, match="there is no such video"):
            gallery.find(key)
        with pytest.raises(RequestError, match="there is no such video"):
            gallery.delete(key)
        video.unlink(missing_ok=True)
    video.parent.rmdir()
    video.parent.symlink_to(secret.parent)
    SmallVideos(secret.parent).make("a.mp4")
    with pytest.raises(RequestError, match="there is no such video"):
        gallery.find(key)
    assert gallery.page().data == [] and secret.is_file()


def test_delete_removes_a_video_with_what_lies_beside_it(videos: SmallVideos, gallery: Gallery) -> None:
    video = videos.make("a.mp4")
    other = videos.make("b.mp4")
    for ending in (".json", ".gif", ".txt"):
        video.with_suffix(ending).touch()
        other.with_suffix(ending).touch()
    key = gallery.page().data[1].id
    made = gallery.thumbnail(key)
    gallery.delete(key)
    left = sorted(path.name for path in videos.folder.iterdir())
    assert left == ["a.txt", "b.gif", "b.json", "b.mp4", "b.txt"]
    assert not made.exists() and names(gallery) == ["b.mp4"]


def test_an_index_that_is_deleted_or_damaged_is_made_anew(
    videos: SmallVideos, gallery: Gallery, tmp_path: Path
) -> None:
    videos.make("a.mp4")
    assert names(gallery) == ["a.mp4"]
    file = tmp_path / "state" / "gallery.sqlite"
    file.unlink()
    gallery.expire()
    assert names(gallery) == ["a.mp4"]
    gallery.refresh()
    file.write_bytes(b"no database at all" * 500)
    gallery.expire()
    assert names(gallery) == ["a.mp4"]
    gallery.refresh()
    with sqlite3.connect(file) as index:
        index.execute("PRAGMA user_version = 99")
        index.execute("DROP TABLE videos")
    index.close()
    gallery.expire()
    assert names(gallery) == ["a.mp4"]


def test_an_index_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="index of the gallery .*: cannot be used .*: make room") as error:
        Gallery(tmp_path, tmp_path / "file" / "gallery.sqlite")
    assert error.value.status == 503


def test_a_folder_that_does_not_exist_yet_is_empty(videos: SmallVideos, tmp_path: Path) -> None:
    gallery = Gallery(tmp_path / "later", tmp_path / "index.sqlite")
    page = gallery.page()
    assert (page.data, page.next, page.total, page.checkpoints) == ([], None, 0, [])
    os.rename(videos.make("a.mp4"), tmp_path / "a.mp4")
    (tmp_path / "later").mkdir()
    os.rename(tmp_path / "a.mp4", tmp_path / "later" / "a.mp4")
    gallery.expire()
    assert names(gallery) == ["a.mp4"]


def test_the_thread_indexes_all_and_ends(videos: SmallVideos, gallery: Gallery) -> None:
    for number in range(100):
        videos.make(f"{number}.mp4")
    page = gallery.page(1)
    assert page.data[0].name == "99.mp4"
    thread = gallery._thread
    if thread is not None:
        thread.join(seconds_left())
    assert gallery._thread is None and not gallery.page().indexing
    gallery.close()


def test_listings_survive_changes_of_folder_and_index_at_the_same_time(
    videos: SmallVideos, gallery: Gallery, tmp_path: Path
) -> None:
    made = [videos.make(f"{number % 3}/{number}.mp4") for number in range(60)]
    over, listings, unexpected = threading.Event(), [], []

    def list_all() -> None:
        while not over.is_set():
            try:
                listings.append(names(gallery))
            except RequestError as error:  # the index vanished in the middle of a listing
                unexpected.extend([error] if error.status != 503 else [])
            except Exception as error:
                unexpected.append(error)

    threads = [threading.Thread(target=list_all) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(60, 90):
        made.pop(0).unlink()
        made.append(videos.make(f"new/{number}.mp4"))
        gallery.expire()
        (tmp_path / "state" / "gallery.sqlite").unlink(missing_ok=True)
        before = len(listings) + len(unexpected)
        wait_for(lambda before=before: len(listings) + len(unexpected) > before, "a listing")
    over.set()
    for thread in threads:
        thread.join()
    gallery.expire()
    gallery.refresh()
    assert unexpected == [] and names(gallery) == [path.name for path in reversed(made)]
