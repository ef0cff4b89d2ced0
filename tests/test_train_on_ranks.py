"""Training under torchrun and accelerate launch, against one process."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from stdit.data.decoding.decode import decode_clip
from stdit.parallel.processes.watchdog import HEARTBEAT_SECONDS
from tests import warm
from tests.launch import ROOT, launch, start
from tests.test_train import metrics
from tests.training.tiny import tiny_settings

STEPS = 20


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[dict[str, Any]], Path]:
    """Settings of a run, and its metrics and folder on one process."""
    folder = tmp_path_factory.mktemp("ranks")
    settings = [
        *tiny_settings(folder),
        *("--trainer.steps", str(STEPS), "--checkpoint.every", "10"),
        *("--data.buckets", json.dumps([dict(num_frames=3, height=8, width=8, fps=8, batch_size=3)])),
        *("--model.patch_size", "[1, 3, 4]"),
        *("--validation.prompts", '["the red square moves", "a blue star", "grey"]'),
        *("--validation.every", str(STEPS)),
        *("--validation.num_inference_steps", "2"),
    ]
    assert warm.run(["train.py", *settings, "--name", "alone"]).returncode == 0
    run = folder / "outputs" / "alone"
    return settings, metrics(run), run


@pytest.mark.parametrize(
    "ranks, split, launcher, sharded",
    [
        pytest.param(2, ["--parallel.sp", "1"], "torchrun", "false", marks=pytest.mark.slow),
        pytest.param(2, ["--parallel.sp", "2"], "accelerate", "false", marks=pytest.mark.slow),
        (4, ["--parallel.grid", "[1, 2]"], "warm", "true"),
        pytest.param(4, ["--parallel.grid", "[2, 2]"], "warm", "false", marks=pytest.mark.slow),
        pytest.param(3, ["--parallel.sp", "3"], "warm", "false", marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_one_process(
    alone: Any, ranks: int, split: list[str], launcher: str, sharded: str
) -> None:
    settings, expected, run = alone
    name = f"{launcher}-{ranks}-{sharded}"
    settings = [*settings, "--name", name, *split, "--parallel.shard_parameters", sharded]
    code, _, errors = launch("train.py", ranks, settings, launcher)
    assert code == 0, errors
    check_losses(run.with_name(name), expected)
    check_results(run.with_name(name), run)


@pytest.mark.gpu
def test_losses_on_gpus_are_those_of_one_process(alone: Any) -> None:
    """On one GPU, also resumed half way; and with NCCL on two, by frames and by samples."""
    settings, expected, run = alone
    runs = {"gpu": (1, 1), "gpu-dp": (2, 1), "gpu-sp": (2, 2)}
    for name, (ranks, sp) in runs.items():
        if ranks > torch.cuda.device_count():
            pytest.skip("NCCL needs two GPUs")
        flags = [*settings, "--name", name, "--parallel.sp", str(sp), "--trainer.device", "auto"]
        for steps in (STEPS // 2, STEPS):
            code, _, errors = launch("train.py", ranks, [*flags, "--trainer.steps", str(steps)], "torchrun")
            assert code == 0, errors
        found = metrics(run.with_name(name))
        assert [line["loss"] for line in found] == pytest.approx(
            [line["loss"] for line in expected], rel=1e-3
        )


def test_sp_auto_is_chosen(alone: Any) -> None:
    """A batch of one clip must be shared, even if only the weights fit in memory and the clip has one frame."""
    settings, _, run = alone
    bucket = dict(num_frames=1, height=8, width=8, fps=8, batch_size=1)
    flags = [
        "--parallel.sp",
        "auto",
        "--parallel.memory_gib",
        "0.0011",
        "--data.buckets",
        json.dumps([bucket]),
    ]
    code, output, errors = launch(
        "train.py", 2, [*settings, *flags, "--name", "chosen", "--trainer.steps", "2"]
    )
    assert code == 0, errors
    assert output.count("parallel.sp = auto, 2 processes: 2, which needs least, and none of 2 fits") == 1
    assert output.count("warning: it will probably run out of memory") == 1
    assert output.count("has 1 frame of 6 tokens: in some blocks, rank 1") == 1
    assert len(metrics(run.with_name("chosen"))) == 2
    assert "sp: auto" in (run.with_name("chosen") / "config.yaml").read_text()


def test_dry_run_prints_once(alone: Any) -> None:
    settings, _, run = alone
    code, output, errors = launch("train.py", 2, [*settings, "--name", "dry", "--dry_run", "true"])
    assert code == 0, errors
    assert output.count("parameters (1 x 2 blocks") == 1
    assert "auto, 2 processes: 1" in output and "auto, 4 processes" not in output
    assert not run.with_name("dry").exists()


@pytest.mark.slow
@pytest.mark.parametrize("grid, sharded", [("[2, 1]", "false"), ("[1, 2]", "true")])
def test_compiled_blocks_give_the_same_losses(alone: Any, grid: str, sharded: str) -> None:
    settings, expected, run = alone
    name = f"compiled-{sharded}"
    flags = ["--trainer.compile", "true", "--parallel.grid", grid, "--parallel.shard_parameters", sharded]
    code, _, errors = launch("train.py", 2, [*settings, "--name", name, *flags])
    assert code == 0, errors
    check_losses(run.with_name(name), expected)


def check_losses(run: Path, expected: list[dict[str, Any]]) -> None:
    found = metrics(run)
    assert [line["step"] for line in found] == list(range(STEPS))
    for one, other in zip(expected, found, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def check_results(run: Path, expected: Path) -> None:
    """Compare exported models and videos; weights move by 1e-3 per step."""
    models = [folder / "pipeline" / "transformer" for folder in (run, expected)]
    assert (models[0] / "config.json").read_bytes() == (models[1] / "config.json").read_bytes()
    found, weights = (load_file(model / "diffusion_pytorch_model.safetensors") for model in models)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-3, rtol=0)
    files = [sorted((folder / "samples").rglob("*.*")) for folder in (run, expected)]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    videos = [[decode_clip(path, 3, 8, 8, 8) for path in some if path.suffix == ".mp4"] for some in files]
    assert len(videos[0]) == 3
    for one, other in zip(*videos, strict=True):
        assert (one.float() - other.float()).abs().mean() < 4, "of 255: weights differ a little, and h264"


def test_a_run_resumes_with_another_split(alone: Any) -> None:
    settings, expected, run = alone
    settings = [*settings, "--name", "moved"]
    for ranks, grid, steps in ((2, "[1, 2]", 10), (3, "[1, 1]", STEPS)):
        split = ["--parallel.grid", grid, "--parallel.shard_parameters", "true"]
        code, _, errors = launch("train.py", ranks, [*settings, *split, "--trainer.steps", str(steps)])
        assert code == 0, errors
    check_losses(run.with_name("moved"), expected)


@pytest.mark.parametrize(
    "ranks, flags, message",
    [
        (2, ["--parallel.sp", "3"], "parallel.sp = 3, but 2 processes were started: start a multiple of 3"),
        (
            4,
            ["--parallel.grid", "[3, 2]"],
            "parallel.grid = [3, 2], of 6 ranks, but 4 processes were started: start a multiple of 6",
        ),
        (4, [], "batch_size = 3, but 4 processes with parallel.sp = 1 split each batch into 4 / 1 = 4 parts"),
        (2, ["--data.manifest", "missing.csv"], "missing.csv"),
        (2, ["--modle.depth", "3"], "--modle.depth is not a setting"),
    ],
)
def test_all_ranks_end_with_one_message(alone: Any, ranks: int, flags: list[str], message: str) -> None:
    settings, _, run = alone
    code, _, errors = launch("train.py", ranks, [*settings, "--name", "refused", *flags])
    assert code != 0
    assert errors.count("error: ") == 1 and message in errors
    assert not run.with_name("refused").exists()


@pytest.mark.parametrize("setting", ["parallel.sp", "trainer.steps"])
def test_ranks_with_different_settings_end_with_one_message(alone: Any, tmp_path: Path, setting: str) -> None:
    settings, _, run = alone
    script = tmp_path / "uneven.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"sys.argv += ['--{setting}', str(1 + int(os.environ['RANK']))]\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    code, _, errors = launch(str(script), 2, [*settings, "--name", "uneven"])
    assert code != 0
    assert errors.count("error: ") == 1 and "of rank 1 differs from that of rank 0" in errors
    assert not run.with_name("uneven").exists()


def test_a_signal_to_one_rank_stops_all_after_the_same_step(alone: Any) -> None:
    settings, _, run = alone
    settings = [*settings, "--name", "stopped", "--trainer.steps", "100000", "--parallel.sp", "2"]
    process = start("train.py", 2, settings)
    try:
        worker = wait_for_workers(process, run.with_name("stopped"))[1]
        worker.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    steps = len(metrics(run.with_name("stopped")))
    assert (run.with_name("stopped") / "checkpoints" / f"step-{steps:08d}" / "meta.json").is_file()


@pytest.mark.parametrize("moment", ["step", pytest.param("import", marks=pytest.mark.slow)])
def test_ctrl_c_under_torchrun_prints_no_traceback_of_ours(alone: Any, moment: str) -> None:
    """Ctrl-C reaches torchrun and all ranks. torchrun prints its own traceback and exits with 1, as the page says."""
    settings, _, run = alone
    run = run.with_name(f"ctrl-c-{moment}")
    settings = [*settings, "--name", run.name, "--trainer.steps", "100000", "--data.workers", "1"]
    process = start("train.py", 2, settings, start_new_session=True)  # a process group, as in a terminal
    try:
        if moment == "step":
            wait_for_workers(process, run)
        else:
            while not workers_of(process):
                time.sleep(0.01)
            time.sleep(0.5)  # in which Python starts
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert errors.count("Traceback") == 1 and "SignalException" in errors, errors
    assert str(ROOT / "stdit") not in errors and str(ROOT / "train.py") not in errors, errors
    if moment == "step":
        steps = len(metrics(run))
        assert (run / "checkpoints" / f"step-{steps:08d}" / "meta.json").is_file()
        assert f"interrupted: {run}/checkpoints/step-{steps:08d} is saved" in output + errors


def test_when_a_rank_dies_all_end_with_one_message(alone: Any) -> None:
    settings, _, run = alone
    settings = [*settings, "--name", "dead", "--trainer.steps", "100000", "--data.workers", "1"]
    process = start("train.py", 2, settings)
    try:
        worker = wait_for_workers(process, run.with_name("dead"))[1]
        everyone = psutil.Process(process.pid).children(recursive=True)
        assert len(everyone) >= 4, "two ranks and their loaders"
        time.sleep(2 * HEARTBEAT_SECONDS)  # after which each has said that it is in a step
        worker.kill()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "local_rank: 1" in errors and "SIGKILL" in errors  # torchrun's words
    assert "[rank0]: Traceback" not in errors
    ours = re.findall(r"error: .*", errors)  # none where torchrun, which stops the others, was faster
    said = r"error: rank 1 is lost: .* rank 0, step \d+, .* last heartbeat was in step \d+"
    assert len(ours) <= 1 and all(re.search(said, line) for line in ours), ours
    assert not psutil.wait_procs(everyone, timeout=10)[1]


def wait_for_workers(process: subprocess.Popen[str], run: Path) -> list[psutil.Process]:
    """Return the processes of the ranks, in order, as soon as the run has done a few steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len(metrics(run)) > 2:
            return workers_of(process)
        time.sleep(0.2)
    raise AssertionError(process.communicate()[1])


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the processes of the ranks, in order."""
    workers = [p for p in psutil.Process(process.pid).children() if "train.py" in p.cmdline()]
    return sorted(workers, key=lambda worker: int(worker.environ()["RANK"]))
