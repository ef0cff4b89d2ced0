"""Exit codes of commands, and who prints their errors."""

import pytest

from stdit.cli import run
from stdit.errors import UserError


def test_run_exits_with_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> None:
        raise error

    for action, code in ((lambda: None, 0), (lambda: 3, 3), (lambda: fail(KeyboardInterrupt()), 130)):
        with pytest.raises(SystemExit) as stop:
            run(action)
        assert stop.value.code == code
    with pytest.raises(SystemExit) as stop:
        run(lambda: fail(UserError("depth = 0: must be 1")))
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("error: depth = 0: must be 1\n")
    with pytest.raises(ValueError, match="bug"):
        run(lambda: fail(ValueError("bug")))


def test_a_process_that_fails_alone_prints_its_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "5")
    waited: list[float] = []
    monkeypatch.setattr("stdit.cli.time.sleep", waited.append)

    def fail() -> None:
        raise UserError("depth = 0: must be 1")

    with pytest.raises(SystemExit, match="2"):
        run(fail)
    assert capsys.readouterr().err == "error: rank 5: depth = 0: must be 1\n" and waited == [10.0]
