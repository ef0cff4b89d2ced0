"""A worker in this process: what becomes of jobs, whatever happens while their videos are made."""

import errno
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from stdit.errors import UserError
from stdit.lora.config import ADAPTER_FILE
from stdit.parallel.processes.mesh import Mesh
from stdit.pipelines import runner, video_io
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.pipeline import STDiTPipeline
from stdit.pipelines.video_io import read_frames, read_metadata, to_uint8
from stdit.serve.api.app import build_app
from stdit.serve.queue import previews
from stdit.serve.queue.catalog import Catalog
from stdit.serve.queue.jobs import JobStore
from stdit.serve.queue.paths import ServerPaths
from stdit.serve.queue.previews import Previewer
from stdit.serve.queue.worker import Worker
from tests.lora.tiny import write_random_adapter
from tests.serve.servers import PROMPT, URL, command, png

QUICK = {"num_inference_steps": 4, "refine_pairs": 0}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    """A worker that has loaded the model that comes with stdit."""
    folder = tmp_path_factory.mktemp("server")
    settings = command(folder)
    paths = ServerPaths(settings.state_folder, settings.videos_folder, settings.runs_folder)
    worker = Worker("w", SampleConfig(), paths, Mesh(), JobStore(paths.jobs_file), Catalog(paths.runs))
    worker.store.register("w")
    worker._load("bundled")
    return worker


@pytest.fixture(scope="module")
def shared_client(worker: Worker) -> Iterator[TestClient]:
    """The API of the server of this worker."""
    settings = command(worker.paths.runs.parent)
    with TestClient(build_app(settings, with_workers=False), base_url=URL) as client:
        yield client


@pytest.fixture
def ask(shared_client: TestClient) -> Callable[..., dict[str, Any]]:
    """Ask for a video."""

    def ask(**fields: Any) -> dict[str, Any]:
        answer = shared_client.post("/v1/videos", json={"prompt": PROMPT, **QUICK, **fields})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    return ask


def state_of(worker: Worker, video: dict[str, Any]) -> str:
    job = worker.store.get(video["id"])
    assert job is not None
    return job.state


def test_a_batch_has_the_videos_that_each_would_have_alone(
    worker: Worker, ask: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[np.ndarray] = []
    write = video_io.write_mp4

    def keep(path: Path, frames: np.ndarray, *args: Any) -> Any:
        kept.append(frames)
        return write(path, frames, *args)

    monkeypatch.setattr(video_io, "write_mp4", keep)
    videos = [ask(seed=seed) for seed in range(3)]
    jobs = worker.store.claim("w", 8)
    assert [job.id for job in jobs] == [video["id"] for video in videos]
    worker.make(jobs)
    pipe = STDiTPipeline.from_pretrained()
    for seed, frames in enumerate(kept):
        generator = torch.Generator().manual_seed(seed)
        alone = pipe(PROMPT, generator=generator, output_type="np", **QUICK).frames[0]
        assert np.abs(to_uint8(alone).astype(int) - frames).max() <= 1
    job = worker.store.get(videos[0]["id"])
    assert job is not None and job.file is not None
    metadata = read_metadata(worker.paths.videos / job.file)
    assert (
        metadata["seed"] == 0
        and metadata["model_calls"] == 8
        and metadata["checkpoint_hash"].startswith("xxh3:")
    )


def test_a_video_that_is_there_is_not_made_again(
    worker: Worker, ask: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker was killed after it had written the video, before it could say so."""
    ask(seed=11)
    [job] = worker.store.claim("w", 1)
    with monkeypatch.context() as patch:
        patch.setattr(JobStore, "complete", lambda *_: False)
        worker.make([job])
    worker.store.release(crashed=True)
    worker.store.register("w")
    monkeypatch.setattr(runner, "sample_batch", lambda *_, **__: pytest.fail("made again"))
    [again] = worker.store.claim("w", 1)
    worker.make([again])
    found = worker.store.get(job.id)
    assert found is not None and found.state == "completed" and found.file is not None
    assert len(read_frames(worker.paths.videos / found.file, 99)) == 25


def test_too_little_memory_halves_the_batch_then_fails_the_job(
    worker: Worker, ask: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    sample = runner.sample_batch

    def sample_if_small(pipe: Any, batch: Any, **options: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > 1 or batch[0].seed == 22:
            raise runner.OutOfMemoryError("1 videos at once need more memory than there is: lower ...")
        return sample(pipe, batch, **options)

    monkeypatch.setattr(runner, "sample_batch", sample_if_small)
    videos = [ask(seed=20 + number) for number in range(4)]
    worker.make(worker.store.claim("w", 8))
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    assert [state_of(worker, video) for video in videos] == ["completed", "completed", "failed", "completed"]


@pytest.mark.parametrize("error", [OverflowError("int too large"), UserError("its frames are damaged")])
def test_an_error_of_one_job_fails_that_alone(
    worker: Worker, ask: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    sample = runner.sample_batch

    def fail_one(pipe: Any, batch: Any, **options: Any) -> Any:
        if any(request.seed == 26 for request in batch):
            raise error
        return sample(pipe, batch, **options)

    monkeypatch.setattr(runner, "sample_batch", fail_one)
    videos = [ask(seed=25 + number) for number in range(3)]
    worker.make(worker.store.claim("w", 8))
    assert [state_of(worker, video) for video in videos] == ["completed", "failed", "completed"]
    job = worker.store.get(videos[1]["id"])
    expected = str(error) if isinstance(error, UserError) else "OverflowError"
    assert job is not None and expected in str(job.error)


def test_a_model_too_large_for_its_own_size_makes_smaller_videos(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Claimed(Exception):
        pass

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    def claim(*_: Any) -> None:
        raise Claimed

    monkeypatch.setattr(Worker, "_warm_up", fail)
    monkeypatch.setattr(JobStore, "claim", claim)
    with pytest.raises(Claimed):
        worker.work()


def test_a_preview_that_fails_is_not_tried_at_the_next_step(
    worker: Worker, ask: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []
    monkeypatch.setattr(previews, "time", SimpleNamespace(monotonic=lambda: 1.0 + 0.2 * len(tries)))

    def fail(*_: Any) -> None:
        tries.append(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Previewer, "_frames", fail)
    video = ask(seed=33)
    worker.make(worker.store.claim("w", 8))
    assert state_of(worker, video) == "completed" and len(tries) == 1


def test_a_full_disk_fails_the_job_and_leaves_no_file(
    worker: Worker, ask: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    video = ask(seed=31)
    with monkeypatch.context() as patch:
        patch.setattr(video_io, "write_mp4", fail)
        worker.make(worker.store.claim("w", 8))
    job = worker.store.get(video["id"])
    assert job is not None and job.state == "failed" and "No space left on device" in str(job.error)
    assert not list(worker.paths.videos.glob(f"*{video['id'].removeprefix('video_')}*"))
    later = ask(seed=32)
    worker.make(worker.store.claim("w", 8))
    assert state_of(worker, later) == "completed"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"num_inference_steps": 20}, [1, 2, 3, 4, 5]), ({"refine_pairs": 3}, [1, 2, 3, 4, 6])],
    ids=["steps", "refinement"],
)
def test_a_cancelled_batch_ends_after_its_step(
    worker: Worker,
    ask: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    expected: list[int],
) -> None:
    videos = [ask(seed=40 + number, **fields) for number in range(2)]
    jobs, steps = worker.store.claim("w", 8), []
    record = Worker._record_step

    def cancel_at_three(self: Worker, batch: Any, loaded: Any, progress: Any) -> Any:
        steps.append(progress.step)
        if progress.step == 3:
            worker.store.cancel(videos[0]["id"])
        if progress.step == expected[-1]:
            worker.store.delete(videos[1]["id"])
        return record(self, batch, loaded, progress)

    monkeypatch.setattr(Worker, "_record_step", cancel_at_three)
    worker.make(jobs)
    assert steps == expected
    assert state_of(worker, videos[0]) == "cancelled" and worker.store.get(videos[1]["id"]) is None


def test_a_video_cancelled_at_the_end_leaves_no_file(
    worker: Worker, ask: Callable[..., dict[str, Any]]
) -> None:
    video = ask(seed=50)
    jobs = worker.store.claim("w", 1)
    request = worker._read(jobs[0]).request
    worker.store.cancel(video["id"])
    worker.paths.videos.mkdir(exist_ok=True)
    file = worker.paths.video_file(video["id"], request)
    file.write_bytes(b"")
    worker._complete(jobs[0], worker._read(jobs[0]), 1.0)
    assert not file.exists()


def test_a_model_that_is_gone_fails_its_jobs(worker: Worker, ask: Callable[..., dict[str, Any]]) -> None:
    video = ask(seed=60)
    [job] = worker.store.claim("w", 1)
    worker.make([replace(job, body=job.body | {"model": "gone"})])
    found = worker.store.get(video["id"])
    assert found is not None and (found.state, found.param) == ("failed", "model")
    assert "there is no such model" in str(found.error)


def test_conditioning_frames_of_uploads_and_videos(
    worker: Worker, shared_client: TestClient, ask: Callable[..., dict[str, Any]]
) -> None:
    upload = shared_client.post("/v1/uploads", files={"file": ("red.png", png())}).json()
    first = ask(seed=70, conditions=[{"upload": upload["id"], "frame": 0}])
    worker.make(worker.store.claim("w", 8))
    red = first_frame(shared_client, first, worker)
    assert red[..., 0].mean() > 200 and red[..., 1:].mean() < 60
    second = ask(seed=71, conditions=[{"video": first["id"], "source_frame": -1, "length": 1, "frame": 0}])
    worker.make(worker.store.claim("w", 8))
    last = read_frames(file_of(worker, first), 99)[-1].astype(int)
    assert np.abs(first_frame(shared_client, second, worker).astype(int) - last).mean() < 12


def test_a_video_of_damaged_frames_fails_without_a_path_of_the_server(
    worker: Worker, shared_client: TestClient, ask: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (25, 64, 64, 3), np.uint8)
    video_io.write_mp4(tmp_path / "clip.mp4", noise, 12.0)
    content = bytearray((tmp_path / "clip.mp4").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = b"\xff" * 2000  # an upload is decoded as far as its first frame
    upload = shared_client.post("/v1/uploads", files={"file": ("clip.mp4", bytes(content))}).json()
    video = ask(seed=72, conditions=[{"upload": upload["id"], "length": 20}])
    worker.make(worker.store.claim("w", 8))
    job = worker.store.get(video["id"])
    assert job is not None and job.state == "failed" and job.error is not None
    assert job.error.startswith("condition 1: ") and "damaged" in job.error
    assert str(worker.paths.state) not in job.error


def test_a_video_that_is_deleted_in_the_gallery_is_gone(
    worker: Worker, shared_client: TestClient, ask: Callable[..., dict[str, Any]]
) -> None:
    video = ask(seed=75)
    worker.make(worker.store.claim("w", 8))
    name = file_of(worker, video).name
    listed = shared_client.get("/v1/gallery?limit=200").json()["data"]
    [key] = [one["id"] for one in listed if one["name"] == name]
    assert shared_client.delete(f"/v1/gallery/{key}").status_code == 200
    assert shared_client.get(f"/v1/videos/{video['id']}").status_code == 404


def file_of(worker: Worker, video: dict[str, Any]) -> Path:
    job = worker.store.get(video["id"])
    assert job is not None and job.file is not None, job
    return worker.paths.videos / job.file


def first_frame(client: TestClient, video: dict[str, Any], worker: Worker) -> np.ndarray:
    return read_frames(file_of(worker, video), 99)[0]


def test_a_video_is_reproduced_from_its_file(
    worker: Worker, shared_client: TestClient, ask: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """By the request in it; or, as videos of the command line have none, by the hashes of all its files."""
    assert worker._loaded is not None
    write_random_adapter(worker.paths.runs / "style" / "lora" / ADAPTER_FILE, worker._loaded.pipe.transformer)
    upload = shared_client.post("/v1/uploads", files={"file": ("red.png", png())}).json()
    files = {"loras": [{"id": "style", "weight": 0.5}], "conditions": [{"upload": upload["id"]}]}
    original = ask(seed=80, guidance_scale=2.0, solver="unipc", **files)
    worker.make(worker.store.claim("w", 8))
    metadata = read_metadata(file_of(worker, original))
    assert str(worker.paths.runs.parent) not in str(metadata)
    assert [lora["file"] for lora in metadata["loras"]] == [ADAPTER_FILE]
    del metadata["request"]
    video_io.write_mp4(tmp_path / "v.mp4", np.zeros((2, 64, 64, 3), np.uint8), 8, metadata)
    for file in (file_of(worker, original), tmp_path / "v.mp4"):
        found = shared_client.post("/v1/inspect", files={"file": file.read_bytes()}).json()
        assert found["reproducible"] and found["model"] == "bundled", found
        again = shared_client.post("/v1/videos", json=found["settings"]).json()
        worker.make(worker.store.claim("w", 8))
        frames = [read_frames(file_of(worker, video), 99) for video in (original, again)]
        assert np.array_equal(*frames)


def test_segments_of_a_long_video(worker: Worker, ask: Callable[..., dict[str, Any]]) -> None:
    video = ask(seed=90, segments=2, segment_prompts=["a red star rises"])
    assert video["num_frames"] > 40
    worker.make(worker.store.claim("w", 8))
    assert len(read_frames(file_of(worker, video), 999)) == video["num_frames"]


def test_content_and_thumbnail_of_a_finished_video(
    worker: Worker, shared_client: TestClient, ask: Callable[..., dict[str, Any]]
) -> None:
    video = ask(seed=95)
    worker.make(worker.store.claim("w", 8))
    place = f"/v1/videos/{video['id']}/content"
    whole = shared_client.get(place)
    assert (
        whole.headers["content-type"] == "video/mp4" and whole.content == file_of(worker, video).read_bytes()
    )
    part = shared_client.get(place, headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == whole.content[10:20]
    assert shared_client.get(place, params={"variant": "thumbnail"}).headers["content-type"] == "image/webp"
    named = shared_client.get(place, params={"download": True}).headers["content-disposition"]
    assert "a-red-star" in named
    shared_client.delete(f"/v1/videos/{video['id']}")
    assert not list(worker.paths.videos.glob(f"*{video['id'].removeprefix('video_')}*"))
