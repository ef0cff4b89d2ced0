"""A rollback on several ranks: batches that were read ahead are dropped, and the ranks stay in step."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.sequence.group import Group
from stdit.training import session as session_module
from stdit.training.config import parse_train
from stdit.training.rollback import _newest_before
from stdit.training.spikes import SpikeGuard
from stdit.training.stop_signals import stop_signals
from tests.parallel.ranks import run_on_ranks
from tests.training.test_checkpoint_writer import folder_of, save
from tests.training.tiny import tiny_settings
from train import loop


def test_no_rollback_to_before_the_last_change_of_the_run(tmp_path: Path) -> None:
    writer = folder_of(tmp_path, keep_last=9)
    old, changed, late = (save(writer, step) for step in (2, 4, 6))
    assert _newest_before(tmp_path, 4, 3) is None and late.is_dir()
    assert _newest_before(tmp_path, 4, 5) == changed and old.is_dir() and not late.exists()


@pytest.mark.slow
def test_two_ranks_roll_back_and_exclude_the_same_steps(tmp_path: Path) -> None:
    tiny_settings(tmp_path)
    run_on_ranks(2, roll_back, tmp_path)


def roll_back(group: Group, folder: Path) -> None:
    flags = ["--name", "back", "--checkpoint.every", "2", "--trainer.steps", "8"]
    flags += ["--trainer.spike.factor", "3", "--trainer.spike.exclude_batches", "2"]
    config = parse_train(["--config", str(folder / "tiny.yaml"), *flags])
    AcceleratorState._reset_state(True)
    watchdog = session_module.build_watchdog(Mesh(), config.parallel)  # of one process: it needs no torchrun
    calls = [0]

    def is_spike(guard: SpikeGuard, level: float, loss: float) -> bool:
        calls[0] += 1
        return calls[0] == 6

    with pytest.MonkeyPatch.context() as patch, stop_signals() as signals, ExitStack() as stack:
        patch.setattr(session_module, "build_watchdog", lambda *_: watchdog)
        patch.setattr(SpikeGuard, "is_spike", is_spike)
        session = stack.enter_context(session_module.start(config, signals))
        assert loop(session) == 0
    run = folder / "outputs" / "back"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(8))
    assert [line["step"] for line in lines if line.get("excluded")] == [4, 5]
    assert max(path.name for path in (run / "checkpoints").glob("step-*")) == "step-00000008"
