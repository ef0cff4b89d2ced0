import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from stdit.errors import UserError
from stdit.serve.errors import RequestError, error_body
from stdit.serve.runs import launch_processes, launches
from stdit.serve.runs.launch_processes import Launch
from stdit.serve.runs.launches import OVERRIDES, Launches
from stdit.serve.runs.runs import Runs
from stdit.serve.runs.runs_api import runs_routes
from stdit.settings import to_yaml
from stdit.training.config import parse_train
from tests.serve.run_folders import locked, make_run

ECHO = "import os, sys; print(sys.argv[1:], os.getsid(0) == os.getpid(), os.environ.get('RANK'), sys.stdin.read())"
QUICKSTART = {"config": "train/quickstart", "name": "new"}


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "outputs")


@pytest.fixture
def started(runs: Runs) -> Launches:
    return Launches(runs)


@pytest.fixture
def client(runs: Runs, started: Launches) -> TestClient:
    return client_of(runs, started)


def client_of(runs: Runs, started: Launches) -> TestClient:
    app = FastAPI()
    app.include_router(runs_routes(runs, started))

    @app.exception_handler(UserError)
    def refuse(request: Request, error: UserError) -> JSONResponse:
        assert isinstance(error, RequestError)
        return JSONResponse(error_body(str(error), error.param, error.error_code, error.status), error.status)

    return TestClient(app)


def instead_of_training(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(launch_processes, "TRAIN_CODE", code)


def ended(started: Launches, launch: Launch, seconds: float = 20.0) -> Launch:
    """The launch once its process has ended."""
    late = time.monotonic() + seconds
    while (now := started.state(launch.id)).state == "running":
        assert time.monotonic() < late, now.report
        time.sleep(0.02)
    return now


def refusal(client: TestClient, url: str = "/v1/launches", status: int = 400, **order: Any) -> dict[str, Any]:
    """The error of a request that must be refused."""
    answer = client.post(url, json=order)
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def test_a_training_is_a_process_of_its_own_with_exactly_these_arguments(
    client: TestClient, started: Launches, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_training(monkeypatch, ECHO)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("STDIT_SERVER_TOKEN", "secret")
    overrides = {"optimizer.lr": 1e-3, "seed": 7}
    answer = client.post("/v1/launches", json={**QUICKSTART, "steps": 50, "overrides": overrides})
    assert answer.status_code == 200 and answer.json()["name"] == "new" and not answer.json()["dry_run"]
    launch = ended(started, Launch(**answer.json()))
    flags = ["--optimizer.lr=0.001", "--seed=7", "--trainer.steps=50"]
    config = launches._offered()["train/quickstart"]
    expected = ["--config", str(config), f"--output_dir={runs.given}", "--name=new", *flags]
    assert launch.state == "done" and launch.report == f"{expected} True None \n"
    assert launch.command.startswith("python train.py --config train/quickstart --output_dir=")
    assert (runs.root / "new.log").read_text() == launch.report
    assert not (runs.root / "new").exists()  # it is the training that makes it


def test_a_start_that_fails_at_once_is_reported_with_its_words(
    client: TestClient, started: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_training(
        monkeypatch, "import sys; print('error: data.manifest: is not there', file=sys.stderr); sys.exit(2)"
    )
    launch = ended(started, Launch(**client.post("/v1/launches", json=QUICKSTART).json()))
    assert (launch.state, launch.exit_code) == ("failed", 2)
    assert launch.report == "error: data.manifest: is not there\n"
    shown = client.get(f"/v1/launches/{launch.id}").json()
    assert shown["report"] == launch.report and shown["state"] == "failed"


def test_a_log_is_continued_and_only_the_new_lines_are_shown(
    started: Launches, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_training(monkeypatch, "print('step 1\\rstep 2\\rstep 3\\nend')")
    runs.root.mkdir()
    (runs.root / "new.log").write_text("before\n")
    launch = ended(started, started.start("train/quickstart", "new", {}, False))
    assert launch.report == "step 3\nend\n"
    assert (runs.root / "new.log").read_bytes().startswith(b"before\nstep 1\r")


def test_a_log_that_is_a_link_is_not_followed(started: Launches, runs: Runs, tmp_path: Path) -> None:
    runs.root.mkdir()
    (runs.root / "new.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match="run new cannot be started: new.log"):
        started.start("train/quickstart", "new", {}, False)
    assert not (tmp_path / "elsewhere").exists()


def test_the_output_of_a_dry_run_is_kept_up_to_a_limit(
    client: TestClient, started: Launches, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_training(monkeypatch, "import sys; print(sys.argv[-1]); print('x' * 10**6)")
    launch = ended(
        started, Launch(**client.post("/v1/launches", json={**QUICKSTART, "dry_run": True}).json())
    )
    assert launch.state == "done" and launch.dry_run and launch.report.startswith("--dry_run=steps\nxxx")
    assert len(launch.report) == launch_processes._MOST_OUTPUT
    assert not runs.root.exists()


def test_a_dry_run_that_takes_too_long_is_ended(started: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    instead_of_training(monkeypatch, "import time; print('began', flush=True); time.sleep(60)")
    monkeypatch.setattr(launch_processes, "_DRY_RUN_SECONDS", 0.5)
    launch = ended(started, started.start("train/quickstart", "new", {}, True))
    assert (launch.state, launch.exit_code) == ("failed", -signal.SIGKILL)
    assert launch.report == "began\n\nstopped: it took more than 0 s\n"


def test_a_dry_run_ends_the_one_before_it_of_the_same_name(
    started: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_training(monkeypatch, "import time; time.sleep(60)")
    first = started.start("train/quickstart", "new", {}, True)
    second = started.start("train/quickstart", "new", {"seed": 3}, True)
    assert started.state(first.id).exit_code == -signal.SIGKILL
    assert started.state(second.id).state == "running"


def test_closing_ends_dry_runs_but_no_training(started: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    instead_of_training(monkeypatch, "import time; time.sleep(60)")
    training = started.start("train/quickstart", "new", {}, False)
    dry_run = started.start("train/quickstart", "new", {}, True)
    started.close()
    assert ended(started, dry_run).exit_code == -signal.SIGKILL
    assert started.state(training.id).state == "running"
    started.processes._started[training.id].process.kill()
    ended(started, training)


def test_processes_at_a_time_and_launches_that_are_kept_are_limited(
    started: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_training(monkeypatch, "import time; time.sleep(60)")
    first = [started.start("train/quickstart", f"new{number}", {}, True) for number in range(2)]
    with pytest.raises(RequestError, match="2 dry runs that were started here are running") as error:
        started.start("train/quickstart", "third", {}, True)
    assert error.value.status == 429
    started.close()
    for launch in first:
        ended(started, launch)
    monkeypatch.setattr(launch_processes, "MOST_KEPT", 3)
    instead_of_training(monkeypatch, "")
    others = [ended(started, started.start("train/quickstart", "new", {}, True)) for _ in range(3)]
    with pytest.raises(RequestError, match="there is none of this id"):
        started.state(first[0].id)
    assert started.state(others[0].id).state == "done"


@pytest.mark.parametrize(
    "config",
    [
        "",
        "../train/quickstart",
        "/etc/passwd",
        "configs/train/quickstart.yaml",
        "sample/quickstart",
        "train/none",
    ],
)
def test_only_configs_that_come_with_stdit_are_started(client: TestClient, config: str) -> None:
    error = refusal(client, config=config, name="new")
    assert error["param"] == "config" and "is none of those that the page can start" in error["message"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".a",
        "-a",
        "a/b",
        "a\\b",
        "a\nb",
        "a\0",
        "/tmp/x",
        "a" * 101,
        "a b",
        "--import=os",
        "$(ls)",
        "\u202ea",
    ],
)
def test_names_of_new_runs(client: TestClient, name: str) -> None:
    assert refusal(client, config="train/quickstart", name=name)["param"] == "name"


def test_a_run_that_exists_is_not_started_again(client: TestClient, runs: Runs) -> None:
    make_run(runs.root / "new")
    error = refusal(client, status=409, **QUICKSTART)
    assert error["code"] == "exists" and "resume it, or choose another name" in error["message"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.manifest", "/etc/passwd"),
        ("imports", "os"),
        ("codec.path", "x"),
        ("output_dir", "/tmp"),
        ("", 1),
        ("x" * 10_000, 1),
        ("trainer.steps", 1.5),
        ("trainer.steps", "5"),
        ("trainer.steps", -1),
        ("trainer.steps", 2**70),
        ("trainer.steps", 0),
        ("seed", 2**63),
        ("optimizer.lr", "1e-3"),
        ("optimizer.lr", -1),
        ("optimizer.lr", 0),
        ("init_from", "../run"),
        ("init_from", "/etc"),
        ("init_from", "none"),
        ("init_from", 3),
        ("init_from", "a" * 300),
    ],
)
def test_overrides_are_of_a_short_list_and_checked(
    client: TestClient, runs: Runs, monkeypatch: pytest.MonkeyPatch, key: str, value: object
) -> None:
    monkeypatch.setattr(launch_processes, "_popen", lambda *_, **__: pytest.fail("started"))
    answer = client.post("/v1/launches", json={**QUICKSTART, "overrides": {key: value}})
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"] in (f"overrides.{key}"[:90], "name")
    assert not runs.root.exists()


def test_errors_of_settings_are_those_of_the_command(client: TestClient) -> None:
    error = refusal(client, **QUICKSTART, steps=0)
    assert error["message"] == "trainer.steps = 0: must be at least 1"
    assert error["param"] == "overrides.trainer.steps"
    error = refusal(client, config="train/own-clips", name="new")
    assert error["message"].startswith("data.manifest is empty")


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b'{"config": 3, "name": "a"}', b'{"config": "train/quickstart"}', b"\xff"]
    + [b'{"config": "train/quickstart", "name": "a", "shell": true}']
    + [b'{"config": "train/quickstart", "name": "a", "overrides": {"seed": [1]}}']
    + [b'{"config": "train/quickstart", "name": "a", "overrides": {"optimizer.lr": NaN}}'],
)
def test_bad_bodies_are_refused(client: TestClient, runs: Runs, body: bytes) -> None:
    answer = client.post("/v1/launches", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422) and "Traceback" not in answer.text


def test_a_run_of_the_folder_can_be_the_beginning_of_another(
    client: TestClient, started: Launches, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_training(monkeypatch, ECHO)
    make_run(runs.root / "first")
    launch = started.start("train/quickstart", "new", {"init_from": "first"}, True)
    assert f"'--init_from={runs.given / 'first'}'" in ended(started, launch).report


def test_configs_are_offered_with_what_they_lack(client: TestClient) -> None:
    found = client.get("/v1/configs").json()
    configs = {config["name"]: config for config in found["data"]}
    assert list(configs)[:2] == ["train/own-clips", "train/quickstart"]
    assert (
        configs["train/quickstart"]["summary"]
        == "The embedded shapes data set: ten minutes of training on two CPU cores:"
    )
    assert "it needs clips" in configs["train/own-clips"]["missing"]
    assert found["overrides"] == OVERRIDES and found["allow_training"]
    assert not any(name.startswith("sample/") for name in configs)


def test_a_server_can_forbid_training(runs: Runs) -> None:
    client = client_of(runs, Launches(runs, allow_training=False))
    make_run(runs.root / "run")
    urls = ("/v1/launches", "/v1/runs/run/stop", "/v1/runs/run/resume")
    for url in urls:
        error = refusal(client, url, 403, **(QUICKSTART if url == urls[0] else {}))
        assert error["code"] == "training_not_allowed" and "--server.allow_training true" in error["message"]
    assert not client.get("/v1/configs").json()["allow_training"]


def test_a_run_that_is_running_finished_or_damaged_is_not_resumed(client: TestClient, runs: Runs) -> None:
    folder = make_run(runs.root / "run", steps=40, done=40)
    url = "/v1/runs/run/resume"
    error = refusal(client, url, 409)
    assert error["code"] == "finished" and "it has done 40 steps: give more steps" in error["message"]
    assert refusal(client, url, 409, steps=40)["param"] == "steps"
    with locked(folder):
        assert refusal(client, url, 409, steps=80)["code"] == "running"
    (folder / "config.yaml").write_text("{")
    assert "config.yaml is damaged" in refusal(client, url, 409, steps=80)["message"]
    (folder / "config.yaml").unlink()
    assert "it has no config.yaml" in refusal(client, url, 409, steps=80)["message"]
    (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": {"stepz": 3}}))
    assert "trainer.stepz is not a setting" in refusal(client, url, 400, steps=80)["message"]
    (folder / "config.yaml").write_text(yaml.safe_dump({"imports": ["os"]}))
    assert "add --import os to the command if you trust it" in refusal(client, url, 400, steps=80)["message"]
    assert client.post("/v1/runs/none/resume").status_code == 404


def test_a_run_is_resumed_with_its_own_config(
    client: TestClient, started: Launches, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_training(monkeypatch, ECHO)
    manifest = {"manifest": "clips.csv"}
    make_run(runs.root / "run", steps=40, done=40, resume="never", data=manifest)
    launch = ended(started, Launch(**client.post("/v1/runs/run/resume", json={"steps": 80}).json()))
    flags = ["--config", str(runs.given / "run/config.yaml"), f"--output_dir={runs.given}", "--name=run"]
    flags += ["--trainer.steps=80", "--resume=auto", "--dry_run=false"]
    assert launch.report.startswith(str(flags))


def test_stop_sends_a_signal_to_the_training(client: TestClient, runs: Runs) -> None:
    folder = make_run(runs.root / "run")
    assert "no process trains there" in refusal(client, "/v1/runs/run/stop", 409)["message"]
    with locked(folder) as process:
        answer = client.post("/v1/runs/run/stop")
        assert answer.status_code == 200 and answer.json()["name"] == "run"
        assert process.wait(10) == 7
    assert client.post("/v1/runs/none/stop").status_code == 404


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"host": "elsewhere"},
            r"is trained on elsewhere, and this is another one: touch .*run/stop on any machine",
        ),
        ({"script": "edit.py"}, "is locked by process .*, whose command is not that of a training"),
    ],
)
def test_stop_leaves_other_processes_alone(
    client: TestClient, runs: Runs, options: dict[str, str], words: str
) -> None:
    folder = make_run(runs.root / "run")
    with locked(folder, **options) as process:
        answer = client.post("/v1/runs/run/stop")
        assert answer.status_code == 409
        pytest.raises(RequestError, Launches(runs).stop, "run").match(words)
        time.sleep(0.1)
        assert process.poll() is None


def test_stop_does_not_believe_a_lock_file_that_nobody_has_locked(client: TestClient, runs: Runs) -> None:
    folder = make_run(runs.root / "run")
    (folder / ".lock").write_text(f"{os.uname().nodename}, process {os.getpid()}, since 2026\n")
    assert "no process trains there" in refusal(client, "/v1/runs/run/stop", 409)["message"]
    with locked(folder) as process:  # another process than the file says
        (folder / ".lock").write_text(f"{os.uname().nodename}, process {os.getpid()}, since 2026\n")
        assert "its process is not seen from here" in refusal(client, "/v1/runs/run/stop", 409)["message"]
        assert process.poll() is None


def test_a_training_outlives_the_server(tmp_path: Path) -> None:
    """Though the server is killed with all of its process group."""
    code = f"""
import os, pathlib, signal
from stdit.serve.runs import launch_processes
from stdit.serve.runs.launches import Launches
from stdit.serve.runs.runs import Runs
launch_processes.TRAIN_CODE = "import os, time; print(os.getpid(), flush=True); time.sleep(1.5); print('end')"
Launches(Runs(pathlib.Path({str(tmp_path)!r}))).start("train/quickstart", "new", {{}}, False)
while not pathlib.Path({str(tmp_path)!r}, "new.log").read_text().endswith("\\n"):
    pass
os.killpg(0, signal.SIGKILL)
"""
    server = subprocess.run([sys.executable, "-c", code], start_new_session=True)
    assert server.returncode == -signal.SIGKILL
    late = time.monotonic() + 20
    while not (tmp_path / "new.log").read_text().endswith("end\n"):
        assert time.monotonic() < late
        time.sleep(0.05)


@pytest.mark.slow
def test_a_real_training_is_resumed_watched_and_stopped(tmp_path: Path) -> None:
    from tests.training.tiny import tiny_settings

    settings = [*tiny_settings(tmp_path), "--trainer.steps=100000", "--name=run"]
    config = parse_train([*settings, f"--output_dir={tmp_path / 'runs'}"])
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "config.yaml").write_text(to_yaml(config))
    runs = Runs(tmp_path / "runs")
    started = Launches(runs)
    launch = started.resume("run")
    late = time.monotonic() + 120
    while runs.summary("run").step < 3:
        assert time.monotonic() < late and started.state(launch.id).state == "running", started.state(
            launch.id
        )
        time.sleep(0.1)
    run = runs.details("run")
    assert run.state == "running" and "loss" in run.fields and run.problem is None
    started.stop("run")
    launch = ended(started, launch, 60)
    assert launch.exit_code == 0 and "preempted" in launch.report and "is saved" in launch.report
    assert runs.summary("run").state == "stopped"
    runs.details("run")
    runs.checkpoints.wait()
    assert {one.state for one in runs.details("run").checkpoints} == {"whole"}
