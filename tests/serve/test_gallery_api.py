import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from stdit.errors import UserError
from stdit.pipelines.video_io import write_mp4
from stdit.serve.api.inspection import Inspector
from stdit.serve.errors import RequestError, error_body
from stdit.serve.gallery.gallery import Gallery
from stdit.serve.gallery.gallery_api import gallery_routes
from stdit.serve.gallery.thumbnails import thumbnail
from stdit.serve.queue.catalog import Catalog
from stdit.serve.queue.uploads import Uploads
from stdit.serve.webp import webp_of_frames
from tests.serve.small_videos import SmallVideos


@pytest.fixture
def videos(tmp_path: Path) -> SmallVideos:
    return SmallVideos(tmp_path / "outputs")


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    app = FastAPI()
    inspector = Inspector(
        Catalog(tmp_path / "outputs"), Uploads(tmp_path / "uploads", 1000), lambda fields: None
    )
    gallery = Gallery(tmp_path / "outputs", tmp_path / "gallery.sqlite", tmp_path / "thumbnails")
    app.include_router(gallery_routes(gallery, lambda file: inspector.file(file).model_dump()))

    @app.exception_handler(UserError)
    def refuse(request: Request, error: UserError) -> JSONResponse:
        assert isinstance(error, RequestError)
        return JSONResponse(error_body(str(error), error.param, error.error_code, error.status), error.status)

    return TestClient(app)


def test_the_gallery_is_listed_in_pages(videos: SmallVideos, client: TestClient) -> None:
    for number in range(5):
        videos.make(f"{number}.mp4", f"prompt {number}", checkpoint="outputs/run/pipeline")
    page = client.get("/v1/gallery?limit=3").json()
    assert [video["name"] for video in page["data"]] == ["4.mp4", "3.mp4", "2.mp4"]
    assert (page["total"], page["checkpoints"]) == (5, ["run"])
    fields = "id name folder created bytes prompt seed checkpoint checkpoint_step width height num_frames"
    assert set(page["data"][0]) == {*fields.split(), "num_inference_steps", "fps", "seconds"}
    following = client.get("/v1/gallery", params={"limit": 3, "before": page["next"]}).json()
    assert [video["name"] for video in following["data"]] == ["1.mp4", "0.mp4"] and following["next"] is None
    found = client.get("/v1/gallery", params={"search": "PROMPT 3", "checkpoint": "run"}).json()
    assert [video["name"] for video in found["data"]] == ["3.mp4"]


def test_a_video_is_served_whole_in_ranges_and_as_a_download(videos: SmallVideos, client: TestClient) -> None:
    content = videos.make("ä b.mp4").read_bytes()
    url = f"/v1/gallery/{client.get('/v1/gallery').json()['data'][0]['id']}"
    whole = client.get(f"{url}/content")
    assert whole.content == content and whole.headers["content-type"] == "video/mp4"
    part = client.get(f"{url}/content", headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == content[10:20]
    download = client.get(f"{url}/content?download=1").headers["content-disposition"]
    assert download.startswith("attachment") and "%C3%A4%20b.mp4" in download
    assert client.get(f"{url}/settings").json()["metadata"]["prompt"] == "a red circle"
    assert client.delete(url).json() == {"id": url[-24:], "object": "gallery.deleted", "deleted": True}
    assert client.get(f"{url}/content").status_code == 404


def test_a_thumbnail_is_a_small_animation_that_is_made_once(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = np.zeros((30, 120, 400, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[:, 10 * number : 10 * number + 60] = 255
    (tmp_path / "outputs").mkdir()
    write_mp4(tmp_path / "outputs" / "a.mp4", frames, 10.0, {"prompt": "a bar"})
    url = f"/v1/gallery/{client.get('/v1/gallery').json()['data'][0]['id']}/thumbnail"
    answer = client.get(url)
    assert answer.headers["content-type"] == "image/webp"
    with PIL.Image.open(io.BytesIO(answer.content)) as picture:
        assert picture.size == (192, 58) and picture.n_frames == 8  # type: ignore[attr-defined]
        picture.seek(7)
        picture.load()
        assert picture.info["duration"] in range(300, 450) and picture.info["loop"] == 0
    monkeypatch.setattr(
        "stdit.serve.gallery.thumbnails.thumbnail_frames", lambda _: pytest.fail("made again")
    )
    assert client.get(url).content == answer.content


def test_the_thumbnail_of_a_new_video_replaces_that_of_the_old(videos: SmallVideos, tmp_path: Path) -> None:
    video, cache = videos.make("a.mp4"), tmp_path / "cache"
    first = thumbnail(video, cache)
    videos.make("a.mp4")
    second = thumbnail(video, cache)
    assert first != second and [path for path in cache.rglob("*") if path.is_file()] == [second]


@pytest.mark.parametrize("damage", ["cut", "noise", "text", "picture", "missing"])
def test_a_damaged_video_has_no_thumbnail_and_leaves_no_file(
    videos: SmallVideos, tmp_path: Path, damage: str
) -> None:
    video = videos.make("a.mp4")
    content = bytearray(video.read_bytes())
    at = content.index(b"mdat") + 4
    if damage == "cut":
        video.write_bytes(content[: at + 5])
    if damage == "noise":
        content[at:] = bytes(255 - one for one in content[at:])
        video.write_bytes(content)
    if damage == "text":
        video.write_text("#EXTM3U\nfile:///etc/passwd\n")
    if damage == "picture":
        PIL.Image.new("RGB", (8, 8)).save(video, "PNG")
    if damage == "missing":
        video.unlink()
    with pytest.raises(UserError, match="a.mp4"):
        thumbnail(video, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_a_video_that_is_damaged_after_its_metadata_gives_no_thumbnail_but_404(
    videos: SmallVideos, client: TestClient
) -> None:
    video = videos.make("a.mp4")
    content = bytearray(video.read_bytes())
    at = content.index(b"mdat") + 4
    content[at:] = bytes(255 - one for one in content[at:])
    video.write_bytes(content)
    key = client.get("/v1/gallery").json()["data"][0]["id"]
    answer = client.get(f"/v1/gallery/{key}/thumbnail")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "no_thumbnail"


def test_settings_of_hostile_metadata_are_sent_or_refused(videos: SmallVideos, client: TestClient) -> None:
    videos.make_raw("a.mp4", '{"prompt": "\\ud800", "fps": NaN, "seed": 1' + "0" * 400 + "}")
    videos.make_raw("b.mp4", '{"prompt": "deep", "x": ' + "[" * 30 + "]" * 30 + "}")
    deep, strange = [video["id"] for video in client.get("/v1/gallery").json()["data"]]
    metadata = client.get(f"/v1/gallery/{strange}/settings").json()["metadata"]
    assert metadata == {"prompt": "?", "fps": "nan", "seed": "a huge number"}
    refused = client.get(f"/v1/gallery/{deep}/settings")
    assert refused.status_code == 404 and "nested more than 20 deep" in refused.json()["error"]["message"]


def test_frames_become_webp_of_at_most_a_size() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (4, 10, 300, 3), dtype=np.uint8)
    with PIL.Image.open(io.BytesIO(webp_of_frames(frames, 4.0, longest=100))) as picture:
        assert picture.size == (100, 3) and picture.n_frames == 4  # type: ignore[attr-defined]
    with PIL.Image.open(io.BytesIO(webp_of_frames(frames[:1], 4.0, longest=100))) as picture:
        assert picture.size == (100, 3) and picture.n_frames == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "key",
    [
        "..%2F..%2Fetc%2Fpasswd",
        "%2e%2e",
        "a" * 24,
        "A" * 24,
        "a" * 5000,
        "%00",
        "%ff%fe",
        "'; DROP TABLE videos; --",
    ],
)
@pytest.mark.parametrize("route", ["/content", "/thumbnail", "/settings", ""])
def test_hostile_ids_are_not_found(videos: SmallVideos, client: TestClient, key: str, route: str) -> None:
    video = videos.make("a.mp4")
    url = f"/v1/gallery/{key}{route}"
    answer = client.get(url) if route else client.delete(url)
    assert answer.status_code in (404, 405) and "Traceback" not in answer.text
    assert video.is_file()


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=201", "limit=x", "before=x", "before=" + "1" * 100, "search=" + "x" * 501]
    + ["search=" + "a+" * 30, "checkpoint=" + "x" * 201],
)
def test_bad_queries_are_refused(client: TestClient, query: str) -> None:
    assert client.get(f"/v1/gallery?{query}").status_code in (400, 422)


@pytest.mark.parametrize("query", ["search=%ff%00", "checkpoint=%00", "search=%25_'%22", "before=-5-7"])
def test_strange_queries_find_nothing(videos: SmallVideos, client: TestClient, query: str) -> None:
    videos.make("a.mp4")
    assert client.get(f"/v1/gallery?{query}").json()["data"] == []


def test_the_schema_names_all_fields(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    assert "GalleryPage" in schema["components"]["schemas"]
    assert "indexing" in schema["components"]["schemas"]["GalleryPage"]["properties"]
