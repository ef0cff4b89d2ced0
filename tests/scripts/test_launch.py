"""The launch scripts: SLURM's with stand-ins for its commands, launch_node.sh on two network namespaces."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.network import NoLinkError, limited_link
from tests.launch import ROOT
from tests.test_train import metrics
from tests.training.tiny import tiny_settings

COMMANDS = {
    "scontrol": 'echo "$@" >> "$SAID"; [ "$1" = show ] && printf "%s\\n" node3 node4; true',
    "srun": """[ "$1" = --kill-on-bad-exit=1 ] && shift
trap 'kill -USR1 $tasks' USR1
tasks=
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks="$tasks $!"; done
worst=0
for task in $tasks; do
    while kill -0 $task 2>/dev/null; do wait $task; done
    wait $task; code=$?; [ $code -gt $worst ] && worst=$code
done
exit $worst""",
    "python": """echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> "$SAID"
[ -n "$FAKE_CODE" ] && exit $FAKE_CODE
trap 'exit 0' USR1
echo ready >> "$SAID"
while :; do sleep 0.1; done""",
}


def slurm(folder: Path, code: str = "", **environment: str) -> "tuple[subprocess.Popen[str], Path]":
    said = folder / "said"
    said.touch()
    for name, text in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    variables = dict(SLURM_JOB_NODELIST="node[3-4]", SLURM_JOB_ID="70001", SLURM_NTASKS="2", SAID=str(said))
    variables |= {"PATH": f"{folder}:{os.environ['PATH']}", "FAKE_CODE": code, **environment}
    command = ["bash", str(ROOT / "scripts" / "slurm.sbatch"), "--name", "a b; touch x"]
    return subprocess.Popen(command, cwd=folder, env=os.environ | variables, text=True), said


def test_slurm_starts_every_rank_and_requeues_after_a_signal(tmp_path: Path) -> None:
    process, said = slurm(tmp_path)
    deadline = time.monotonic() + 60
    while said.read_text().count("ready") < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    lines = said.read_text().splitlines()
    expected = "2 node3 30001 train.py --name a b; touch x"
    assert {f"0 0 {expected}", f"1 1 {expected}", "requeue 70001"} <= set(lines)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("code", "restarts", "again"), [("0", "0", False), ("1", "0", True), ("1", "5", False), ("2", "0", False)]
)
def test_slurm_requeues_only_after_the_fault_of_a_machine(
    tmp_path: Path, code: str, restarts: str, again: bool
) -> None:
    process, said = slurm(tmp_path, code, SLURM_RESTART_COUNT=restarts)
    assert process.wait(timeout=60) == int(code)
    assert ("requeue 70001" in said.read_text()) == again


@pytest.mark.slow
def test_two_machines_train_as_one_restart_and_end_together(tmp_path: Path) -> None:
    """A rank of the second machine is killed: the ranks of both restart and resume from the checkpoint."""
    psutil: Any = pytest.importorskip("psutil")
    settings = [*tiny_settings(tmp_path), "--trainer.steps", "100000", "--checkpoint.every", "3"]
    run = tmp_path / "outputs" / "tiny"
    try:
        with limited_link("1gbit") as network:
            nodes = []
            for number, prefix in enumerate(network.prefixes or []):
                own = {"NODES": "2", "NODE": str(number), "MASTER": "10.77.0.1", "PROCESSES": "1"}
                own |= {"ADDRESS": f"10.77.0.{number + 1}", "OMP_NUM_THREADS": "1", "RESTARTS": "1"}
                own |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
                command = [*prefix, "bash", "scripts/launch_node.sh", *settings]
                nodes.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | network.environment | own))
            try:
                wait_for(lambda: (run / "checkpoints" / "step-00000006").exists(), nodes)
                rank = next(
                    child
                    for child in psutil.Process(nodes[1].pid).children(recursive=True)
                    if "-u" in child.cmdline()
                )
                before = len(metrics(run))
                rank.kill()
                wait_for(lambda: len(metrics(run)) > before + 6, nodes)
                (run / "stop").touch()
                assert [node.wait(timeout=300) for node in nodes] == [0, 0]
            finally:
                for node in nodes:
                    node.terminate()
    except NoLinkError as error:
        pytest.skip(f"this machine makes no namespaces: {error}")
    assert [line["step"] for line in metrics(run)] == list(range(len(metrics(run))))


def wait_for(happened: Any, nodes: "list[subprocess.Popen[bytes]]") -> None:
    deadline = time.monotonic() + 400
    while not happened():
        assert time.monotonic() < deadline and all(node.poll() is None for node in nodes)
        time.sleep(0.2)
