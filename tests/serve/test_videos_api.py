"""Routes of videos on a server without workers: what is accepted, what is refused and in which words."""

import errno
import io
import json
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import anyio
import numpy as np
import PIL.Image
import pytest
from fastapi.testclient import TestClient
from openapi_spec_validator import validate

from stdit.codecs.tiling import AUTO_SIZES, TilePlan
from stdit.hashing import hash_file
from stdit.pipelines.video_io import write_gif, write_mp4
from stdit.serve.api.app import build_app
from stdit.serve.errors import RequestError
from stdit.serve.heavy_work import HeavyWork
from stdit.serve.queue.jobs import JobStore
from stdit.serve.queue.uploads import Uploads
from tests.lora.tiny import write_random_adapter
from tests.pipelines.tiny import tiny_model
from tests.serve.servers import PROMPT, URL, command, png
from tests.waiting import seconds_left

HUGE = 10**400
"""A number that no float holds."""


def error_of(answer: Any) -> dict[str, Any]:
    """The error of an answer, which has OpenAI's form."""
    assert 400 <= answer.status_code < 500, answer.text
    found: dict[str, Any] = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def clip(folder: Path, frames: int = 9) -> Path:
    """A video that fades."""
    levels = np.linspace(0, 255, frames).astype(np.uint8)
    write_mp4(folder / "clip.mp4", np.broadcast_to(levels[:, None, None, None], (frames, 64, 64, 3)), 12.0)
    return folder / "clip.mp4"


def test_a_video_waits_with_all_that_was_asked(client: TestClient) -> None:
    body = {"prompt": PROMPT, "seed": 5, "num_inference_steps": 8, "guidance_scale": 2.0, "cache": "slow"}
    video = client.post("/v1/videos", json=body).json()
    assert video["status"] == "queued" and video["position"] == 0 and video["size"] == "64x64"
    assert video["settings"] == body | {"model": "bundled"}
    assert client.get(f"/v1/videos/{video['id']}").json() | {"eta_seconds": None} == video
    again = client.post("/v1/videos", json=video["settings"]).json()
    assert again["settings"] == video["settings"] and again["position"] == 1


def test_a_seed_is_drawn_and_told(client: TestClient) -> None:
    seeds = {client.post("/v1/videos", json={"prompt": PROMPT}).json()["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_openais_names(client: TestClient) -> None:
    video = client.post("/v1/videos", data={"prompt": PROMPT, "size": "64x64", "seconds": "1"}).json()
    assert (video["width"], video["height"], video["num_frames"]) == (64, 64, 13)


@pytest.mark.parametrize(
    "body, param, words",
    [
        ({}, "prompt", "must be a text"),
        ({"prompt": 3}, "prompt", "must be a text"),
        ({"prompt": "x" * 100_000}, "prompt", "has 100,000 characters"),
        ({"prompt": "x\0"}, "prompt", "remove them"),
        ({"prompt": PROMPT, "num_frame": 3}, "num_frame", "did you mean num_frames?"),
        ({"prompt": PROMPT, "num_frames": 26}, "num_frames", "use 29"),
        ({"prompt": PROMPT, "height": 80, "width": 64}, "height", "was not trained on 64x80"),
        ({"prompt": PROMPT, "height": 63, "width": 64}, "height", "was not trained on 64x63: use 64x64"),
        ({"prompt": PROMPT, "height": 64}, "width", "width is missing"),
        ({"prompt": PROMPT, "size": "64 x 64"}, "size", "must be WIDTHxHEIGHT"),
        ({"prompt": PROMPT, "size": "99999x99999"}, "size", "size = '99999x99999': height = 99999: must be"),
        ({"prompt": PROMPT, "size": "80x64"}, "size", "was not trained on 80x64: use 64x64"),
        ({"prompt": PROMPT, "seconds": 3600}, "seconds", "seconds = 3600: num_frames = 43201: must be"),
        ({"prompt": PROMPT, "seconds": "soon"}, "seconds", "must be a number"),
        ({"prompt": PROMPT, "refine_level": 0.5, "refine_pairs": 0}, "refine_level", "would have no effect"),
        ({"prompt": PROMPT, "segments": 2, "overlap": 30}, "overlap", "none to generate"),
        ({"prompt": PROMPT, "segments": 1000}, "segments", "at most 64"),
        ({"prompt": PROMPT, "model": "gone"}, "model", "there is no such model"),
        ({"prompt": PROMPT, "model": 1}, "model", "must be a text"),
        ({"prompt": PROMPT, "loras": [{"id": "none"}]}, "loras[0].id", "there is no adapter 'none'"),
        ({"prompt": PROMPT, "loras": "none"}, "loras", "must be a list"),
        ({"prompt": PROMPT, "loras": [{"id": "x", "weight": "1"}]}, "loras[0].weight", "from -100 to 100"),
        ({"prompt": PROMPT, "conditions": [{"frame": 0}]}, "conditions[0]", "id of an upload"),
        (
            {"prompt": PROMPT, "conditions": [{"upload": "../../etc/passwd"}]},
            "conditions[0]",
            "there is no upload",
        ),
        (
            {"prompt": PROMPT, "conditions": [{"upload": "x", "frame": "0"}]},
            "conditions[0].frame",
            "must be a whole number",
        ),
        (
            {"prompt": PROMPT, "conditions": [{"video": "video_1"}]},
            "conditions[0]",
            "there is no finished video",
        ),
        ({"prompt": PROMPT, "image": "/etc/passwd"}, "image", "is not a field"),
        ({"prompt": PROMPT, "input_reference": "x"}, "input_reference", "send it as a file in a form"),
        ({"prompt": PROMPT, "checkpoint": "x"}, "checkpoint", "use model"),
        ({"prompt": PROMPT, "negative_prompt": 5}, "negative_prompt", "negative_prompt: must be a text."),
        ({"prompt": PROMPT, "any_size": 1}, "any_size", "must be true or false"),
        ({"prompt": PROMPT, "segment_prompts": 5}, "segment_prompts", "must be a list of texts"),
        ({"prompt": PROMPT, "segment_prompts": True}, "segment_prompts", "must be a list of texts"),
        ({"prompt": PROMPT, "segment_prompts": ["x\0"]}, "segment_prompts", "each must be a text"),
        ({"prompt": PROMPT, "segment_prompts": ["\ud800"]}, "segment_prompts", "each must be a text"),
        ({"prompt": PROMPT, "segment_prompts": ["x"] * 64}, "segment_prompts", "has 64 texts"),
        ({"prompt": PROMPT, "seconds": HUGE}, "seconds", "seconds: must be a finite number"),
        ({"prompt": PROMPT, "seconds": str(HUGE)}, "seconds", "must be a number above 0"),
        ({"prompt": PROMPT, "seconds": True}, "seconds", "must be a number above 0"),
        ({"prompt": PROMPT, "size": "६४x६४"}, "size", "must be WIDTHxHEIGHT"),
        ({"prompt": PROMPT, "model": "\ud800"}, "model", "there is no such model"),
        ({"prompt": PROMPT, "solver": "\ud800"}, "solver", "must be one of"),
        ({"prompt": PROMPT, "cache": "\ud800"}, "cache", "must be off"),
        ({"prompt": PROMPT, "\ud800": 1}, "?", "? is not a field"),
        ({"prompt": PROMPT, "conditions": [{"\ud800": 1}]}, "conditions[0]", "conditions: ? = 1"),
        (
            {"prompt": PROMPT, "conditions": [{"video": "\ud800"}]},
            "conditions[0]",
            "there is no finished video",
        ),
        (
            {"prompt": PROMPT, "num_frames": 16384, "height": 16384, "width": 16384, "any_size": True},
            "num_frames",
            "must be at most 2,147,483,648: use num_frames = 8 or fewer",
        ),
        (
            {"prompt": PROMPT, "num_frames": 2048, "size": "1024x1024", "segments": 2, "any_size": True},
            "num_frames",
            "x segments = 2 must be at most 2,147,483,648: use num_frames = 1024 or fewer",
        ),
        *(
            ({"prompt": PROMPT, name: HUGE}, name, f"{name}: must be a finite number")
            for name in ("guidance_scale", "shift", "fps", "refine_level", "num_frames", "seed", "cache")
        ),
        ({"prompt": PROMPT, "guidance_scale": 1e300}, "guidance_scale", "must be a finite number"),
        ({"prompt": PROMPT, "shift": float("nan")}, "shift", "must be a finite number"),
        ({"prompt": PROMPT, "loras": [{"id": "x", "weight": HUGE}]}, "loras[0]", "loras[0].weight: must be"),
        ({"prompt": PROMPT, "pab": [2, HUGE, 4]}, "pab", "pab[1]: must be a finite number"),
        ({"prompt": PROMPT, "guidance_interval": [0.0, HUGE]}, "guidance_interval", "must be a finite"),
    ],
)
def test_what_breaks_a_rule_is_refused_at_its_field(
    client: TestClient, body: dict[str, Any], param: str, words: str
) -> None:
    for route in ("/v1/videos", "/v1/estimate"):
        error = error_of(client.post(route, content=json.dumps(body)))  # as JSON, also halves of pairs
        assert error["param"] == param and words in error["message"], error
    assert client.get("/v1/videos").json()["data"] == []


def test_an_adapter_of_another_architecture_is_refused_before_it_waits(tmp_path: Path) -> None:
    write_random_adapter(tmp_path / "loras" / "small.safetensors", tiny_model())
    settings = command(tmp_path, loras=str(tmp_path / "loras"))
    with TestClient(build_app(settings, with_workers=False), base_url=URL) as client:
        assert [one["id"] for one in client.get("/v1/loras").json()["data"]] == ["small"]
        error = error_of(client.post("/v1/videos", json={"prompt": PROMPT, "loras": [{"id": "small"}]}))
    assert error["param"] == "loras[0].id"
    assert error["message"].startswith("lora small: is of another architecture")


@pytest.mark.parametrize("name", ["seconds", "guidance_scale", "num_frames"])
def test_a_huge_number_of_a_form_is_refused(client: TestClient, name: str) -> None:
    error = error_of(client.post("/v1/videos", data={"prompt": PROMPT, name: str(HUGE)}))
    assert error["param"] == name and "must be a finite number" in error["message"]


@pytest.mark.parametrize(
    "strength, words", [(HUGE, "must be a finite number"), (0, "above 0"), (1.5, "up to 1"), (-1, "above 0")]
)
def test_a_strength_is_above_zero_and_up_to_one(client: TestClient, strength: float, words: str) -> None:
    upload = client.post("/v1/uploads", files={"file": ("a.png", png())}).json()["id"]
    conditions = [{"upload": upload, "strength": strength}]
    error = error_of(client.post("/v1/videos", json={"prompt": PROMPT, "conditions": conditions}))
    assert error["param"] == ("conditions[0]" if strength == HUGE else "conditions[0].strength")
    assert words in error["message"]


@pytest.mark.parametrize(
    "entry, field, words",
    [
        ({"frame": 99}, ".frame", "frame = 99: the video has the frames 0 to 24"),
        ({"frame": 20, "length": 9}, ".length", "has 5 frames, not 9"),
        ({"length": 3}, ".length", "its source has 1 frames"),
        ({"frames": 3}, "", "conditions: frames = 3: use upload"),
    ],
)
def test_conditioning_frames_that_do_not_fit_are_refused_at_their_field(
    client: TestClient, entry: dict[str, int], field: str, words: str
) -> None:
    upload = client.post("/v1/uploads", files={"file": ("a.png", png())}).json()["id"]
    conditions = [{"upload": upload}, {"upload": upload, **entry}]
    error = error_of(client.post("/v1/videos", json={"prompt": PROMPT, "conditions": conditions}))
    assert error["param"] == f"conditions[1]{field}" and words in error["message"]


def test_conditioning_frames_that_overwrite_others_are_told_each_time(client: TestClient) -> None:
    upload = client.post("/v1/uploads", files={"file": ("a.png", png())}).json()["id"]
    body = {"prompt": PROMPT, "conditions": [{"upload": upload}, {"upload": upload, "strength": 0.5}]}
    for route in ("/v1/estimate", "/v1/estimate", "/v1/videos"):
        [warning] = [
            text for text in client.post(route, json=body).json()["warnings"] if "overwrites" in text
        ]
        assert warning == "condition 2 overwrites frame 0 of condition 1: the later one wins"


def test_an_estimate_tells_the_overlap_of_segments(client: TestClient) -> None:
    found = client.post("/v1/estimate", json={"prompt": PROMPT, "segments": 2}).json()
    assert found["num_frames"] == 2 * 25 - found["overlap"] and found["overlap"] > 0
    assert client.post("/v1/estimate", json={"prompt": PROMPT}).json()["overlap"] == 0


def test_a_field_of_a_form_that_is_given_twice_is_refused(client: TestClient) -> None:
    error = error_of(client.post("/v1/videos", data={"prompt": [PROMPT, "another"]}))
    assert error["param"] == "prompt" and error["message"] == "prompt is given twice: send it once."


def test_a_form_that_cannot_be_read_is_refused_in_words(client: TestClient) -> None:
    kind = {"Content-Type": "multipart/form-data"}
    error = error_of(client.post("/v1/uploads", content=b"x", headers=kind))
    assert error["message"].startswith("the request cannot be read (Missing boundary in multipart): ")


def test_settings_of_a_form_are_at_most_as_long_as_json(client: TestClient) -> None:
    fields = {f"field{number}": "x" * 2**19 for number in range(3)}
    answer = client.post("/v1/videos", data={"prompt": PROMPT, **fields}, files={"input_reference": b""})
    assert answer.status_code == 413, answer.text


def test_conditioning_frames_may_leave_out_all_but_their_source(client: TestClient) -> None:
    upload = client.post("/v1/uploads", files={"file": ("a.png", png())}).json()["id"]
    conditions = [{"upload": upload, "frame": None, "source_frame": None, "strength": None, "length": None}]
    assert (
        client.post("/v1/videos", json={"prompt": PROMPT, "conditions": conditions}).json()["status"]
        == "queued"
    )


def test_any_size_can_be_asked_for(client: TestClient) -> None:
    body = {"prompt": PROMPT, "height": 80, "width": 64, "any_size": True}
    video = client.post("/v1/videos", json=body).json()
    assert video["size"] == "64x80"
    assert any("not trained on that" in warning for warning in video["warnings"])


def test_an_estimate_queues_nothing(client: TestClient) -> None:
    found = client.post("/v1/estimate", json={"prompt": PROMPT, "num_inference_steps": 4}).json()
    assert found["model_calls"] == 4 * 2 + 4 * 4 and found["fits"] and found["memory_bytes"] > 1e8
    assert client.get("/v1/videos").json()["data"] == []


def test_the_largest_video_is_foreseen_without_a_search_for_the_best_tiles(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Mock(wraps=TilePlan.of)
    monkeypatch.setattr(TilePlan, "of", plan)
    body = {"prompt": PROMPT, "num_frames": 2048, "size": "1024x1024", "any_size": True}
    found = client.post("/v1/estimate", json=body).json()
    assert plan.call_count < len(AUTO_SIZES) and found["memory_bytes"] > 2**31
    assert any("for the smallest tiles alone" in warning for warning in found["warnings"])


def test_heavy_work_leaves_threads_to_others() -> None:
    async def most_at_once() -> int:
        heavy, running, most, lock, both = HeavyWork(2), 0, 0, threading.Lock(), threading.Barrier(2)

        def work() -> None:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            both.wait(seconds_left())
            with lock:
                running -= 1

        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(heavy.run, work)
        return most

    assert anyio.run(most_at_once) == 2


def test_the_same_key_is_one_video(client: TestClient) -> None:
    key = {"Idempotency-Key": "one"}
    first, second = (client.post("/v1/videos", json={"prompt": PROMPT}, headers=key).json() for _ in range(2))
    assert first["id"] == second["id"] and first["seed"] == second["seed"]
    error = error_of(client.post("/v1/videos", json={"prompt": "another"}, headers=key))
    assert error["code"] == "idempotency_key_reused"


def test_a_key_is_known_after_its_upload_is_gone(client: TestClient, tmp_path: Path) -> None:
    upload = client.post("/v1/uploads", files={"file": ("a.png", png())}).json()["id"]
    body = {"prompt": PROMPT, "conditions": [{"upload": upload}]}
    first = client.post("/v1/videos", json=body, headers={"Idempotency-Key": "one"}).json()
    (tmp_path / "outputs" / ".serve" / "uploads" / upload).unlink()
    assert (
        client.post("/v1/videos", json=body, headers={"Idempotency-Key": "one"}).json()["id"] == first["id"]
    )
    error_of(client.post("/v1/videos", json=body, headers={"Idempotency-Key": "two"}))
    other = {"prompt": PROMPT, "conditions": [{"upload": upload}, {"upload": upload}]}
    error = error_of(client.post("/v1/videos", json=other, headers={"Idempotency-Key": "one"}))
    assert error["code"] == "idempotency_key_reused"


def test_conditioning_frames_by_upload_and_form(client: TestClient, tmp_path: Path) -> None:
    with clip(tmp_path).open("rb") as file:
        upload = client.post("/v1/uploads", files={"file": ("my clip.mp4", file)}).json()
    assert (upload["kind"], upload["num_frames"], upload["name"]) == ("video", 9, "my clip.mp4")
    conditions = [{"upload": upload["id"], "frame": 0, "length": 9}, {"upload": upload["id"], "frame": -1}]
    video = client.post("/v1/videos", json={"prompt": PROMPT, "conditions": conditions}).json()
    assert video["settings"]["conditions"] == conditions
    picture = client.get(f"/v1/uploads/{upload['id']}/thumbnail")
    assert picture.headers["content-type"] == "image/webp"
    form = client.post(
        "/v1/videos", data={"prompt": PROMPT}, files={"input_reference": ("a.png", png())}
    ).json()
    [condition] = form["settings"]["conditions"]
    picture = client.get(f"/v1/uploads/{condition['upload']}/thumbnail")
    with PIL.Image.open(io.BytesIO(picture.content), formats=["WEBP"]) as image:
        assert image.size == (64, 64) and not image.is_animated
    assert condition["frame"] == 0 and condition["length"] == 1
    late = [{"upload": upload["id"], "frame": 20, "length": 9}]
    assert (
        "from frame 20 on the video has 5"
        in error_of(client.post("/v1/videos", json={"prompt": PROMPT, "conditions": late}))["message"]
    )


@pytest.mark.parametrize(
    "content, words",
    [(b"", "empty"), (b"no video", ""), (b"\x89PNG\r\n\x1a\n" + b"x" * 50, "not a readable image")],
)
def test_an_upload_that_is_no_video_is_refused_at_its_field(
    client: TestClient, tmp_path: Path, content: bytes, words: str
) -> None:
    for route, field in (("uploads", "file"), ("videos", "input_reference"), ("estimate", "input_reference")):
        sent = {"data": {"prompt": PROMPT}, "files": {field: ("x.mp4", content)}}
        error = error_of(client.post(f"/v1/{route}", **sent))
        assert (
            error["param"] == field and error["message"].startswith("x.mp4: ") and words in error["message"]
        )
        assert str(tmp_path) not in error["message"]
    assert list((tmp_path / "outputs" / ".serve" / "uploads").glob("*")) == []


def test_an_upload_that_is_cut_short_is_refused(client: TestClient, tmp_path: Path) -> None:
    content = clip(tmp_path).read_bytes()
    error = error_of(client.post("/v1/uploads", files={"file": ("x.mp4", content[: len(content) // 3])}))
    assert error["code"] == "not_a_video"


def test_too_large_requests_are_refused(tmp_path: Path) -> None:
    app = build_app(command(tmp_path, max_upload_mib=0.01), with_workers=False)
    with TestClient(app, base_url=URL) as small:
        answer = small.post("/v1/uploads", files={"file": ("x.png", b"\0" * 2**21)})
        assert answer.status_code == 413 and error_of(answer)["code"] == "too_large"
        assert "larger than 0.01 MiB (--server.max_upload_mib)" in error_of(answer)["message"]
        json_answer = small.post("/v1/videos", content=b" " * 2**21)
        assert json_answer.status_code == 413
        assert error_of(json_answer)["message"].startswith("JSON of more than 1 MiB is not read")


def test_uploads_are_limited_together(tmp_path: Path) -> None:
    app = build_app(command(tmp_path, max_uploads_gib=(len(png(32, 32)) + 9) / 2**30), with_workers=False)
    with TestClient(app, base_url=URL) as client:
        first, second = (
            client.post("/v1/uploads", files={"file": ("a.png", png(side, side))}) for side in (32, 48)
        )
    assert first.status_code == 200 and second.status_code == 507
    assert "--server.max_uploads_gib" in second.json()["error"]["message"]


def test_a_full_disk_is_told(client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("stdit.serve.queue.uploads.os.replace", full)
        answer = client.post("/v1/uploads", files={"file": ("a.png", png())})
    assert answer.status_code == 507 and "No space left" in answer.json()["error"]["message"]
    monkeypatch.setattr("starlette.datastructures.UploadFile.write", full)
    assert client.post("/v1/inspect", files={"file": ("a.png", png())}).status_code == 507
    assert list((tmp_path / "outputs" / ".serve" / "uploads").glob("*")) == []


def test_an_upload_may_be_removed_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = Uploads(tmp_path, 2**20)
    name = uploads.save([png()])["id"]

    def vanish(*args: object) -> None:
        raise FileNotFoundError

    with monkeypatch.context() as patched:
        patched.setattr("stdit.serve.queue.uploads.os.utime", vanish)
        with pytest.raises(RequestError, match="there is no upload"):
            uploads.find(name)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", vanish)
        uploads.remove_older(-1)


def test_videos_are_cancelled_deleted_and_listed_in_pages(client: TestClient) -> None:
    ids = [client.post("/v1/videos", json={"prompt": PROMPT, "seed": seed}).json()["id"] for seed in range(5)]
    page = client.get("/v1/videos", params={"limit": 2}).json()
    assert [one["id"] for one in page["data"]] == ids[:2:-1] and page["has_more"]
    rest = client.get("/v1/videos", params={"limit": 9, "after": page["last_id"]}).json()
    assert [one["id"] for one in rest["data"]] == ids[2::-1] and not rest["has_more"]
    assert client.post(f"/v1/videos/{ids[0]}/cancel").json()["status"] == "cancelled"
    assert client.delete(f"/v1/videos/{ids[1]}").json() == {
        "id": ids[1],
        "object": "video.deleted",
        "deleted": True,
    }
    assert client.get(f"/v1/videos/{ids[1]}").status_code == 404
    assert client.get("/health").json()["queued"] == 3
    assert error_of(client.get(f"/v1/videos/{ids[2]}/content"))["code"] == "not_ready"
    assert client.get(f"/v1/videos/{ids[2]}/content", params={"variant": "settings"}).json()["seed"] == 2


@pytest.mark.parametrize(
    "route, param",
    [
        *((f"videos/{name}", "id") for name in ("x", "video_" + "0" * 24, "%00", "x" * 999)),
        ("videos/x/content", "id"),
        ("videos/x/events", "id"),
        ("videos?after=x", "after"),
        ("uploads/x/thumbnail", "id"),
        ("uploads/file_" + "0" * 64 + "/thumbnail", "id"),
        ("runs/x/samples/first/a.mp4", "step"),
        ("runs/" + "x" * 999, "name"),
        ("launches/" + "x" * 999, "id"),
    ],
)
def test_what_is_not_there_is_not_found_whatever_its_name(client: TestClient, route: str, param: str) -> None:
    answer = client.get(f"/v1/{route}")
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (404, "not_found", param)
    assert "there is no" in error["message"] and "^" not in error["message"]
    if route.startswith("videos/x"):
        assert (
            client.post("/v1/videos/x/cancel").status_code == client.delete("/v1/videos/x").status_code == 404
        )


def test_unknown_routes_and_methods(client: TestClient) -> None:
    assert error_of(client.get("/v1/nothing"))["code"] == "not_found"
    assert error_of(client.put("/v1/videos"))["code"] == "method_not_allowed"
    assert error_of(client.get("/v1/videos/../../etc/passwd"))
    assert error_of(client.get("/static/../app.py"))
    assert error_of(client.post("/v1/videos", content=b"{"))["message"].startswith("the body is no JSON")
    assert error_of(client.post("/v1/videos", content=b"[]"))
    assert error_of(client.post("/v1/videos", content=b"[" * 100_000))


def test_a_broken_server_tells_a_client_nothing(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: JobStore, *args: object) -> None:
        raise RuntimeError("secret place")

    monkeypatch.setattr(JobStore, "list_jobs", fail)
    quiet = TestClient(client.app, base_url=URL, raise_server_exceptions=False)
    answer = quiet.get("/v1/videos")
    assert answer.status_code == 500 and "secret" not in answer.text and "Traceback" not in answer.text


def test_the_schema_is_valid_openapi(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    validate(schema)
    body = schema["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["prompt"] and "num_frames" in body["properties"]


def test_the_page_is_served_with_headers_of_safety(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200 and "<!doctype html>" in answer.text.lower()
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert (
        "access-control-allow-origin"
        not in client.get("/v1/videos", headers={"Origin": "http://evil"}).headers
    )


def test_numbers_for_prometheus(client: TestClient) -> None:
    client.post("/v1/videos", json={"prompt": PROMPT})
    text = client.get("/metrics").text
    assert 'stdit_jobs{state="queued"} 1.0' in text and "stdit_kept_videos 0.0" in text


def test_a_damaged_run_is_named_and_the_others_work(client: TestClient, tmp_path: Path) -> None:
    step = tmp_path / "outputs" / "broken" / "checkpoints" / "step-00000005"
    step.mkdir(parents=True)
    (step / "meta.json").write_text(json.dumps({"files": {}}))
    models = {one["id"]: one for one in client.get("/v1/models").json()["data"]}
    if "broken" in models:
        assert models["broken"]["error"]
        assert (
            error_of(client.post("/v1/videos", json={"prompt": PROMPT, "model": "broken"}))["param"]
            == "model"
        )
    assert models["bundled"]["error"] is None


def test_a_video_is_made_again_from_its_file(client: TestClient, tmp_path: Path) -> None:
    video = client.post("/v1/videos", json={"prompt": PROMPT, "seed": 5, "refine_pairs": 0}).json()
    metadata = {
        "request": video["settings"],
        "checkpoint_hash": "xxh3:none",
        "checkpoint": "gone",
        "checkpoint_step": 3,
    }
    write_mp4(tmp_path / "v.mp4", np.zeros((2, 64, 64, 3), np.uint8), 8, metadata)
    with open(tmp_path / "v.mp4", "rb") as file:
        found = client.post("/v1/inspect", files={"file": file}).json()
    assert not found["reproducible"] and "its checkpoint is not here: gone, step 3" in found["reason"]
    assert found["settings"]["seed"] == 5
    error = error_of(client.post("/v1/inspect", files={"file": ("a.mp4", b"no video")}))
    assert error["code"] == "no_metadata"


def test_a_gif_tells_how_it_was_made(client: TestClient, tmp_path: Path) -> None:
    write_gif(tmp_path / "v.gif", np.zeros((2, 64, 64, 3), np.uint8), 8, {"request": {"prompt": PROMPT}})
    found = client.post("/v1/inspect", files={"file": (tmp_path / "v.gif").read_bytes()}).json()
    assert found["settings"]["prompt"] == PROMPT


def huge_gif() -> bytes:
    return b"GIF89a" + b"\xff" * 4 + b"\0\0\0" + b"," + b"\0" * 4 + b"\xff" * 4 + b"\0\2\0"


@pytest.mark.parametrize(
    "content",
    [
        huge_gif(),
        b"GIF89a",
        b"GIF89a\x40\0\x40\0\0\0\0!\xfe\xff",
        b"G" + bytes(range(256)) * 4,
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b';FFMETADATA1\ncomment={"prompt": "x"}\n',
        b"",
        png(),
    ],
)
def test_hostile_files_hold_no_metadata(client: TestClient, content: bytes) -> None:
    error = error_of(client.post("/v1/inspect", files={"file": ("a.mp4", content)}))
    assert error["code"] == "no_metadata" and "a.mp4: holds no metadata of stdit" in error["message"]


def test_settings_of_a_hostile_file_in_the_gallery(client: TestClient, tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "served"
    folder.mkdir(parents=True)
    write_mp4(folder / "a.mp4", np.zeros((2, 64, 64, 3), np.uint8), 8, {"prompt": PROMPT})
    [found] = client.get("/v1/gallery").json()["data"]
    (folder / "a.mp4").write_bytes(huge_gif())
    assert error_of(client.get(f"/v1/gallery/{found['id']}/settings"))


@pytest.mark.parametrize(
    "name", ["conditions", "loras", "conditioning_files", "padded_from", "request", "image"]
)
@pytest.mark.parametrize("value", [5, [1], {"a": []}, "x"])
def test_metadata_of_any_form_are_shown(client: TestClient, tmp_path: Path, name: str, value: Any) -> None:
    metadata = {"prompt": PROMPT, "conditions": ["a.png@0"], name: value}
    write_mp4(tmp_path / "v.mp4", np.zeros((2, 64, 64, 3), np.uint8), 8, metadata)
    answer = client.post("/v1/inspect", files={"file": (tmp_path / "v.mp4").read_bytes()})
    assert answer.status_code == 200 and not answer.json()["reproducible"]


def test_an_upload_is_hashed_once(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    monkeypatch.setattr(
        "stdit.serve.api.inspection.hash_file", lambda file: hashed.append(file) or hash_file(file)
    )
    picture = tmp_path / "first.png"
    picture.write_bytes(png())
    upload = client.post("/v1/uploads", files={"file": ("first.png", png())}).json()["id"]
    files = {"conditioning_files": {"first.png": hash_file(picture)}}
    metadata = {"prompt": PROMPT, "conditions": ["first.png@0:1"], **files}
    write_mp4(tmp_path / "v.mp4", np.zeros((2, 64, 64, 3), np.uint8), 8, metadata)
    for _ in range(2):
        found = client.post("/v1/inspect", files={"file": (tmp_path / "v.mp4").read_bytes()}).json()
        [condition] = found["settings"]["conditions"]
        assert condition["upload"] == upload
    assert len(hashed) == 1
