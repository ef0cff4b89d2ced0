import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from stdit.errors import UserError
from stdit.serve.errors import RequestError, error_body
from stdit.serve.runs.launches import Launches
from stdit.serve.runs.metrics_reader import MetricsReader
from stdit.serve.runs.run_locks import RunLock, is_training, query_lock
from stdit.serve.runs.runs import Runs
from stdit.serve.runs.runs_api import runs_routes
from tests.serve.run_folders import locked, make_checkpoint, make_run, write_metrics
from tests.serve.small_videos import SmallVideos

OLD = 1_700_000_000


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    (tmp_path / "outputs").mkdir()
    return Runs(tmp_path / "outputs")


@pytest.fixture
def client(runs: Runs) -> TestClient:
    app = FastAPI()
    app.include_router(runs_routes(runs, Launches(runs, allow_training=False)))

    @app.exception_handler(UserError)
    def refuse(request: Request, error: UserError) -> JSONResponse:
        assert isinstance(error, RequestError)
        return JSONResponse(error_body(str(error), error.param, error.error_code, error.status), error.status)

    return TestClient(app)


def test_runs_need_no_torch(runs: Runs) -> None:
    make_checkpoint(make_run(runs.root / "run", done=3), 3)
    code = (
        "from stdit.serve.runs import runs_api, runs; import sys; from pathlib import Path\n"
        f"runs.Runs(Path({str(runs.root)!r})).details('run')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def state(runs: Runs, name: str) -> str:
    return runs.summary(name).state


def test_runs_are_listed_by_their_last_change(runs: Runs) -> None:
    for number, name in enumerate(["a", "b", "c"]):
        os.utime(make_run(runs.root / name, done=3) / "metrics.jsonl", (OLD, OLD + 5 * (number != 1)))
    (runs.root / "videos").mkdir()
    (runs.root / ".serve" / "checkpoints").mkdir(parents=True)
    (runs.root / "file").touch()
    found = runs.summaries()
    assert {run.name for run in found[:2]} == {"a", "c"} and [run.name for run in found[2:]] == ["b"]
    assert found[2].updated == OLD


def test_a_run_that_has_stopped(runs: Runs) -> None:
    make_run(runs.root / "run", steps=100, done=40)
    run = runs.summary("run")
    assert (run.step, run.steps, run.state, run.host, run.pipeline) == (40, 100, "stopped", None, False)
    assert run.loss == pytest.approx(2.95) and run.clips_per_second == pytest.approx(20)
    assert run.eta_seconds is None and run.config == "run/config.yaml" and run.problem is None


def test_a_run_is_finished_at_its_last_step_or_after_an_early_stop(runs: Runs) -> None:
    folder = make_run(runs.root / "run", steps=40, done=40)
    assert state(runs, "run") == "finished"
    folder = make_run(runs.root / "early", steps=100, done=40)
    (folder / "pipeline").mkdir()
    for content, found in (('{"step": 30}', "stopped"), ("{", "stopped"), ('{"step": 40}', "finished")):
        (folder / "pipeline" / "model_index.json").write_text(content)
        assert state(runs, "early") == found and runs.summary("early").pipeline


def test_a_run_that_trains_is_running_and_is_not_disturbed(runs: Runs) -> None:
    folder = make_run(runs.root / "run", steps=100, done=40)
    with locked(folder) as process:
        for _ in range(3):
            run = runs.summary("run")
            assert run.state == "running" and run.host == os.uname().nodename
            assert run.eta_seconds == pytest.approx(60 * 0.4)
            assert query_lock(folder) == RunLock(True, run.host, process.pid)
        assert process.poll() is None
        with open(folder / ".lock", "a+") as other, pytest.raises(OSError):
            fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert state(runs, "run") == "stopped"
    assert query_lock(folder) == RunLock(False, run.host, process.pid)


def test_asking_for_a_lock_never_takes_it(runs: Runs) -> None:
    """A training that starts at that moment gets it."""
    folder = make_run(runs.root / "run")
    (folder / ".lock").touch()
    descriptor = os.open(folder / ".lock", os.O_RDONLY)
    os.close(descriptor)
    for _ in range(3):
        assert query_lock(folder).held is False
        with locked(folder):
            assert query_lock(folder).held is True


def test_a_run_of_another_machine_whose_lock_is_not_seen_may_be_running(runs: Runs) -> None:
    folder = make_run(runs.root / "run", steps=100, done=40)
    (folder / ".lock").write_text("elsewhere, process 1, since 2026-01-01 00:00:00 UTC\n")
    assert state(runs, "run") == "unknown" and runs.summary("run").host == "elsewhere"
    os.utime(folder / "metrics.jsonl", (OLD, OLD))
    assert state(runs, "run") == "stopped"


@pytest.mark.parametrize(
    "content", [b"", b"\xff\0" * 50, b"x" * 10**6, b"host, process 99999999999999, since x"]
)
def test_a_damaged_lock_file_says_nothing(runs: Runs, content: bytes) -> None:
    folder = make_run(runs.root / "run")
    (folder / ".lock").write_bytes(content)
    assert query_lock(folder) == RunLock(False) and state(runs, "run") == "stopped"


def test_a_lock_that_cannot_be_asked_for_is_unknown(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(runs.root / "run")
    os.mkfifo(folder / ".lock")
    assert state(runs, "run") == "unknown"
    (folder / ".lock").unlink()
    (folder / ".lock").touch()

    def refuse(*_: object) -> bytes:
        raise OSError(38, "not implemented")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert state(runs, "run") == "unknown"


def test_command_lines_of_trainings() -> None:
    assert is_training(["/usr/bin/python3.12", "-u", "train.py", "--config", "x"])
    assert is_training(["python", "/venv/bin/stdit-train"])
    assert not is_training(["python", "sample.py"]) and not is_training(["vim", "train.py"])
    assert not is_training([]) and not is_training(["python"])


CONFIGS = {
    "empty": (b"", "holds no settings"),
    "list": (b"[1, 2]", "holds no settings"),
    "half": (b"trainer: {steps: 1", "is damaged"),
    "binary": (b"\xff\xfe\0\0", "is damaged"),
    "tag": (b"a: !!python/object/apply:os.system [ls]", "is damaged"),
    "date": (b"a: 2026-99-99", "is damaged"),
    "deep": (b"[" * 1500, "is damaged"),
    "bomb": (
        b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
            b"%c: &%c [%s]\n" % (one, one, b",".join([b"*%c" % (one - 1)] * 9)) for one in b"bcdefgh"
        ),
        "is damaged",
    ),
    "loop": (b"a: &a [*a]", "is damaged"),
    "large": (b"#" * 300_000, "is no config"),
    "group": (b"trainer: 3\nvalidation: [x]", None),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_damaged_config_is_stated(runs: Runs, client: TestClient, name: str) -> None:
    content, problem = CONFIGS[name]
    folder = make_run(runs.root / "run", done=3)
    (folder / "config.yaml").write_bytes(content)
    answer = client.get("/v1/runs/run")
    assert answer.status_code == 200
    found = answer.json()
    assert found["steps"] is None and found["step"] == 3 and found["state"] == "stopped"
    assert (problem in found["problem"]) if problem else found["problem"] is None
    assert client.get("/v1/runs").json()["data"][0]["problem"] == found["problem"]


def test_settings_that_json_lacks_become_texts(runs: Runs, client: TestClient) -> None:
    folder = make_run(runs.root / "run")
    (folder / "config.yaml").write_text(
        "trainer: {steps: 5, max_grad_norm: .inf}\n1: 2026-01-01\nb: .nan\nc: 1"
        + "0" * 400
        + "\nd: !!binary aGk=\n"
        "validation: {prompts: [a red circle, 3]}\n"
    )
    found = client.get("/v1/runs/run").json()
    assert found["settings"]["trainer"] == {"steps": 5, "max_grad_norm": "inf"}
    assert found["settings"]["1"] == "2026-01-01" and found["settings"]["b"] == "nan"
    assert found["prompts"] == ["a red circle", "3"] and found["steps"] == 5


def test_a_config_that_was_written_again_is_read_again(runs: Runs) -> None:
    folder = make_run(runs.root / "run", steps=10)
    assert runs.summary("run").steps == 10
    (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": {"steps": 2000}}))
    assert runs.summary("run").steps == 2000


def test_checkpoints_are_whole_or_broken_with_a_reason(runs: Runs) -> None:
    run = make_run(runs.root / "run")
    for step in (10, 20, 30, 40, 50):
        make_checkpoint(run, step)
    folders = run / "checkpoints"
    (folders / "step-00000060.tmp").mkdir()
    (folders / "step-00000020" / "model" / "weights.safetensors").unlink()
    (folders / "step-00000030" / "model" / "weights.safetensors").write_bytes(bytes(999))
    (folders / "step-00000040" / "model" / "weights.safetensors").write_bytes(b"\1" * 1000)
    meta = folders / "step-00000050" / "meta.json"
    meta.write_text(meta.read_text().replace('"step": 50', '"step": 51'))
    first = {one.step: one for one in runs.details("run").checkpoints}
    assert [one.state for one in first.values()] == ["whole", "broken", "broken", "whole", "broken"]
    assert first[20].reason == "model/weights.safetensors is missing"
    assert first[30].reason == "model/weights.safetensors has 999 bytes, but 1000 were written"
    assert first[50].reason is not None and first[50].reason.startswith("meta.json has changed")
    assert (
        not first[10].verified
        and first[10].bytes == 1000 + (folders / "step-00000010" / "meta.json").stat().st_size
    )
    runs.checkpoints.wait()
    second = {one.step: one for one in runs.details("run").checkpoints}
    assert second[10].verified and second[10].state == "whole" and second[10].model == "run/step-00000010"
    assert second[40].state == "broken" and second[40].reason is not None
    assert second[40].reason.startswith("model/weights.safetensors has changed since it was written")
    assert str(run) not in "".join(one.reason or "" for one in second.values())


def test_hashes_of_a_checkpoint_are_computed_once(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(make_run(runs.root / "run"), 10)
    runs.details("run")
    runs.checkpoints.wait()
    monkeypatch.setattr("stdit.serve.runs.run_checkpoints.verify", lambda _: pytest.fail("computed again"))
    assert runs.details("run").checkpoints[0].verified
    runs.checkpoints.wait()
    monkeypatch.undo()
    (folder / "model" / "weights.safetensors").write_bytes(b"\2" * 1000)
    assert not runs.details("run").checkpoints[0].verified
    runs.checkpoints.wait()
    assert runs.details("run").checkpoints[0].state == "broken"
    shutil.rmtree(folder)
    assert runs.details("run").checkpoints == []


def test_steps_are_those_of_checkpoints_if_the_metrics_are_gone(runs: Runs) -> None:
    run = make_run(runs.root / "run")
    make_checkpoint(run, 30)
    (run / "metrics.jsonl").unlink()
    assert runs.summary("run").step == 30 and runs.details("run").fields == []


def test_validation_videos_by_step(runs: Runs, client: TestClient) -> None:
    run = make_run(runs.root / "run x")
    videos = SmallVideos(run / "samples")
    for step in (200, 100):
        for number, prompt in enumerate(["a red circle", "a blue square"]):
            videos.make(f"step-{step:08d}/0{number}-ä #.mp4", prompt, num_inference_steps=16)
    (run / "samples" / "step-00000200" / "02-damaged.mp4").write_bytes(b"x")
    (run / "samples" / "step-00000200" / "sheet.png").touch()
    (run / "samples" / "step-00000300.tmp").mkdir()
    (run / "samples" / "step-00000400").symlink_to(run / "samples" / "step-00000100")
    found = client.get("/v1/runs/run%20x/samples").json()
    assert found["steps"] == [100, 200]
    shown = [(one["step"], one["prompt"], one["num_inference_steps"]) for one in found["data"]]
    both = [("a red circle", 16), ("a blue square", 16)]
    assert shown == [*((100, *one) for one in both), *((200, *one) for one in both), (200, None, None)]
    for one in found["data"]:
        content = client.get(one["url"])
        place = run / "samples" / f"step-{one['step']:08d}" / one["name"]
        assert content.status_code == 200 and content.content == place.read_bytes()
    part = client.get(found["data"][0]["url"], headers={"Range": "bytes=0-3"})
    assert part.status_code == 206 and len(part.content) == 4


@pytest.mark.parametrize(
    "file", ["..%2F..%2Fconfig.yaml", "sheet.png", "link.mp4", "%00", "a" * 300, ".hidden.mp4"]
)
@pytest.mark.parametrize("step", ["100", "0", "-1", "x", "9" * 30])
def test_hostile_names_of_validation_videos_are_not_found(
    runs: Runs, client: TestClient, step: str, file: str
) -> None:
    folder = make_run(runs.root / "run") / "samples" / "step-00000100"
    SmallVideos(folder).make(".hidden.mp4")
    (folder / "sheet.png").touch()
    (folder / "link.mp4").symlink_to("/etc/passwd")
    assert client.get(f"/v1/runs/run/samples/{step}/{file}").status_code in (404, 422)


@pytest.mark.parametrize(
    "name",
    ["..", "%2e%2e", "..%2Foutputs%2Frun", ".hidden", "link", "out", "%00", "a" * 500, "none", "%ff", "file"],
)
@pytest.mark.parametrize("route", ["", "/metrics", "/samples", "/samples/1/a.mp4"])
def test_hostile_names_of_runs_are_not_found(
    runs: Runs, client: TestClient, tmp_path: Path, name: str, route: str
) -> None:
    make_run(runs.root / "run")
    make_run(runs.root / ".hidden")
    make_run(tmp_path / "outside")
    (runs.root / "file").touch()
    (runs.root / "link").symlink_to(runs.root / "run")
    (runs.root / "out").symlink_to(tmp_path / "outside")
    assert [run.name for run in runs.summaries()] == ["run"]
    answer = client.get(f"/v1/runs/{name}{route}")
    assert answer.status_code in (404, 422) and "Traceback" not in answer.text


def test_curves_over_http(runs: Runs, client: TestClient) -> None:
    folder = make_run(runs.root / "run", done=1000)
    found = client.get("/v1/runs/run/metrics?fields=loss,lr,none&points=10").json()
    assert found["last_step"] == 999 and found["complete"] and list(found["fields"]) == ["loss", "lr", "none"]
    assert len(found["fields"]["loss"]) == 10 and found["fields"]["none"] == []
    assert found["fields"]["loss"][0] == [99, pytest.approx(4.95), 0, pytest.approx(9.9)]
    write_metrics(folder, range(1000, 1003))
    later = client.get("/v1/runs/run/metrics?after=999").json()
    assert [point[0] for point in later["fields"]["loss"]] == [1000, 1001, 1002]
    assert set(client.get("/v1/runs/run").json()["fields"]) == set(later["fields"])
    for query in ("points=0", "points=2001", "after=-2", "after=x", "points=1e9", "after=" + "9" * 30):
        assert client.get(f"/v1/runs/run/metrics?{query}").status_code == 422


def test_lines_of_curves_are_read_once(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(runs.root / "run", done=20_000)
    runs.curves("run", None, 400, -1)
    monkeypatch.setattr(MetricsReader, "_take", Mock(side_effect=AssertionError("it is read again")))
    found = runs.curves("run", None, 400, -1)
    assert len(found.fields["loss"]) <= 400
    json.dumps(found.fields, allow_nan=False)


def test_a_folder_of_runs_that_is_not_there_is_empty(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "later")
    assert runs.summaries() == []
    make_run(tmp_path / "later" / "run")
    assert [run.name for run in runs.summaries()] == ["run"]


def test_the_schema_names_all_fields(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert {"RunSummary", "RunDetails", "RunCheckpoint", "RunCurves", "ValidationVideos", "Launch"} <= set(
        schemas
    )
    assert schemas["RunSummary"]["properties"]["state"]["enum"] == [
        "running",
        "stopped",
        "finished",
        "unknown",
    ]
