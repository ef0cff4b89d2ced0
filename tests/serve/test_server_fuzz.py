"""Requests that break the schema of the API in every way: never a 500, a traceback, or a file outside the folders."""

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from stdit.serve.api.app import build_app
from tests.serve.servers import command

TOKEN = {"Authorization": "Bearer fuzz"}


def send_hostile_requests(folder: Path, examples: int) -> int:
    """Send requests made from the schema, and ones that break it, to every route; return how many there were.

    Args:
        examples: of each route and kind.
    """
    import stdit.pipelines.workload  # noqa: F401  # what the first request would wait for, longer than allowed

    config = command(folder / "server", token="fuzz", requests_per_second=1e6, allow_training=False)
    config.server.max_waiting = config.server.max_waiting_per_client = 10**6
    app = build_app(config, with_workers=False)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=TOKEN).exclude(path_regex="events")
    sent = 0

    def check(case: Any) -> None:
        nonlocal sent
        sent += 1
        answer = case.call(headers=TOKEN)
        case.validate_response(answer, checks=[not_a_server_error])
        assert "Traceback" not in answer.text[:100_000]
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"]

    options = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for operation in schema.get_all_operations():
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            strategy = operation.ok().as_strategy(generation_mode=mode)
            try:
                options(given(strategy)(lambda case: check(case)))()
            except Unsatisfiable:  # a route without parameters, of which no request breaks the schema
                assert mode == GenerationMode.NEGATIVE
    assert [path.name for path in folder.iterdir()] == ["server"]
    return sent


def test_hostile_requests_get_an_answer(tmp_path: Path) -> None:
    assert send_hostile_requests(tmp_path, 3) > 100


@pytest.mark.slow
def test_ten_thousand_hostile_requests_get_an_answer(tmp_path: Path) -> None:
    assert send_hostile_requests(tmp_path, 300) > 10_000
