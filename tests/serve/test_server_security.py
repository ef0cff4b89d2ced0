"""Who may ask what: passwords, hosts, origins, numbers of requests; and settings of the command line."""

import base64
import logging
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from stdit.errors import UserError
from stdit.serve.api.app import build_app
from stdit.serve.api.security import RequestLimit
from stdit.serve.config import SampleCommand, ServerConfig
from stdit.settings import parse
from tests.serve.servers import PROMPT, URL, command


def guarded(folder: Path, url: str = URL, **server: object) -> TestClient:
    return TestClient(build_app(command(folder, **server), with_workers=False), base_url=url)


def basic(pair: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


def test_a_password_is_asked_for(tmp_path: Path) -> None:
    with guarded(tmp_path, auth="ann:pass wörd") as client:
        answer = client.get("/v1/videos")
        assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic")
        for wrong in (
            basic("ann:no"),
            basic("ann"),
            {"Authorization": "Basic %%%"},
            {"Authorization": "Bearer x"},
        ):
            assert client.get("/", headers=wrong).status_code == 401
        assert client.get("/v1/videos", headers=basic("ann:pass wörd")).status_code == 200
        assert client.get("/health").status_code == 200


def test_a_token_is_one_too(tmp_path: Path) -> None:
    with guarded(tmp_path, token="secret") as client:
        assert client.get("/v1/videos", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.get("/", headers=basic("anyone:secret")).status_code == 200
        assert client.get("/", headers={"Authorization": "Bearer Secret"}).status_code == 401


def test_a_token_may_have_any_letters(tmp_path: Path) -> None:
    with guarded(tmp_path, token="wörd ☃") as client:
        for given, status in (("wörd ☃", 200), ("word", 401)):
            header = {"Authorization": f"Bearer {given}".encode()}
            assert client.get("/v1/videos", headers=header).status_code == status
        assert client.get("/", headers=basic("anyone:wörd ☃")).status_code == 200
        assert client.get("/", headers={"Authorization": "Basic wörd".encode()}).status_code == 401


def test_no_password_is_shown(tmp_path: Path) -> None:
    config = command(tmp_path, token="very-secret", auth="ann:hidden")
    assert "very-secret" not in repr(config) and "hidden" not in repr(config)


def test_no_password_is_logged_or_given_to_workers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    config = command(tmp_path, token="very-secret", auth="ann:hidden")
    with TestClient(build_app(config, with_workers=False), base_url=URL) as client:
        client.get("/v1/videos", headers={"Authorization": "Bearer very-secret"})
    shown = caplog.text + "".join(capsys.readouterr()) + str(config.of_worker())
    assert "very-secret" not in shown and "hidden" not in shown


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[", ""])
def test_a_name_that_leads_here_is_refused(tmp_path: Path, host: str) -> None:
    with guarded(tmp_path) as client:
        answer = client.get("/v1/videos", headers={"Host": host})
        assert answer.status_code == 403 and "is not this server" in answer.json()["error"]["message"]
        assert client.get("/v1/videos", headers={"Host": "localhost:8000"}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "file://"])
def test_pages_of_other_origins_change_nothing(tmp_path: Path, origin: str) -> None:
    with guarded(tmp_path) as client:
        answer = client.post("/v1/videos", json={"prompt": PROMPT}, headers={"Origin": origin})
        assert answer.status_code == 403
        assert client.get("/v1/videos").json()["data"] == []
        own = client.post("/v1/videos", json={"prompt": PROMPT}, headers={"Origin": URL})
        assert own.status_code == 200
        assert "access-control-allow-origin" not in own.headers


def test_only_so_many_requests_a_second(tmp_path: Path) -> None:
    with guarded(tmp_path, requests_per_second=2.0) as client:
        statuses = [client.get("/health").status_code for _ in range(12)]
    assert statuses[:8] == [200] * 8 and statuses[-1] == 429


def test_a_client_that_asks_twice_as_often_gets_half_of_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("stdit.serve.api.security.time.monotonic", lambda: now[0])
    limit, answers = RequestLimit(50.0), []
    for number in range(6000):
        now[0] = number / 100
        answers.append(limit.take("a") == 0.0)
    assert 0.45 < sum(answers[1000:]) / 5000 < 0.55


def test_a_client_gets_its_share_again_and_others_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("stdit.serve.api.security.time.monotonic", lambda: now[0])
    limit = RequestLimit(1.0)
    assert [limit.take("a") for _ in range(4)] == [0.0] * 4
    assert limit.take("a") > 0 and limit.take("b") == 0.0
    now[0] = 1.5
    assert limit.take("a") == 0.0 and limit.take("a") > 0


def test_only_so_many_videos_of_a_client_wait(tmp_path: Path) -> None:
    with guarded(tmp_path, max_waiting_per_client=2) as client:
        answers = [client.post("/v1/videos", json={"prompt": PROMPT}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[-1].json()["error"]["code"] == "queue_full"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--server.port", "70000"], "server.port = 70000: must be"),
        (["--server.host", "0.0.0.0"], "without a password: add --server.auth"),
        (["--server.auth", "ann"], "must be USER:PASSWORD"),
        (["--server.keep_days", "0"], "server.keep_days = 0.0: must be positive"),
        (["--server.workers", "0"], "server.workers = 0: must be at least 1"),
        (["--prompt", "x"], "prompt beside serve"),
        (["--num_frames", "9", "--seed", "2"], "num_frames and seed beside serve"),
        (["--server.prot", "8000"], "did you mean --server.port?"),
    ],
)
def test_settings_that_break_a_rule(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        parse(SampleCommand, ["--serve", *flags])


def test_settings_of_the_server_need_serve() -> None:
    with pytest.raises(UserError, match="server.port is for --serve"):
        parse(SampleCommand, ["--server.port", "8001", "--prompt", "x"])


def test_the_password_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STDIT_SERVER_TOKEN", "from there")
    assert parse(SampleCommand, ["--serve", "--server.host", "0.0.0.0"]).server.token == "from there"
    assert parse(SampleCommand, ["--prompt", "x"]).server == ServerConfig()
    with pytest.raises(UserError, match="server.keep_days is for --serve"):
        parse(SampleCommand, ["--prompt", "x", "--server.keep_days", "3"])
