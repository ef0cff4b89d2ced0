"""Exit codes of commands, and who prints their errors."""

import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize(
    "main",
    [
        "import slow; print('done')",
        "with stop_signals() as signals: import slow; print('done')\n    return signals.exit_code",
    ],
)
def test_ctrl_c_in_an_import_takes_effect_when_that_is_complete(tmp_path: Path, main: str) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, signal, sys\ntry: os.kill(os.getpid(), signal.SIGINT); sum(range(9))\n"
        "except BaseException: print('cut off')\nprint('complete')\n"
    )
    code = "from stdit.cli import run\nfrom stdit.training.stop_signals import stop_signals\n"
    code += f"def main():\n    {main}\nrun(main)\n"
    (tmp_path / "script.py").write_text(code)
    result = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (130, "complete\n"), result.stderr
    assert "Traceback" not in result.stderr


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
