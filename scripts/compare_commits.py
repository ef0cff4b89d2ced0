"""Compare the numbers of two commits on this machine, bit for bit.

    python scripts/compare_commits.py OLD_COMMIT                     # against the current HEAD
    python scripts/compare_commits.py OLD_COMMIT NEW_COMMIT --steps 50 --output outputs/compare
    python scripts/compare_commits.py OLD_COMMIT --only golden resume

For a change that must not change the numbers. Each commit is checked out in a git worktree and runs its own code: the
golden cases of Open-Sora's STDiT3 (output and gradients), a tiny run that is resumed on other splits of ranks, the
shapes data set, scripts/parity.py on two ranks, and the first steps of the quickstart. Results are kept in OUTPUT by
commit, so that a commit is measured once. Exits with 1 if anything differs.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stdit.cli import run, script_parser
from stdit.errors import UserError

ROOT = Path(__file__).parents[1]
LIMIT = 3600.0
"""Seconds after which a command counts as hanging."""

GOLDEN = """
import hashlib, json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from stdit.models.stdit import STDiT

digests = {}
for file in sorted(Path("tests/golden").glob("*.safetensors")):
    tensors = load_file(file)
    model = STDiT.from_opensora({k[2:]: v for k, v in tensors.items() if k.startswith("w.")})
    x = tensors["in.x"].requires_grad_()
    free = tensors.get("in.x_mask", torch.ones(x.shape[0], x.shape[2], dtype=torch.bool))
    out = model(
        hidden_states=x,
        timestep=tensors["in.timestep"][:, None] * free,
        encoder_hidden_states=tensors["in.y"][:, 0],
        encoder_attention_mask=tensors.get("in.mask"),
        **{name: tensors[f"in.{name}"] for name in ("fps", "height", "width")},
    )
    out = out if isinstance(out, torch.Tensor) else out.sample  # of commits before diffusers' output class
    (out.float() * free[:, None, :, None, None]).square().mean().backward()
    found = {"output": out, "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
    for name, tensor in found.items():
        if tensor is not None:
            digests[f"{file.stem} {name}"] = hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()
print("RESULT", json.dumps(digests))
"""
"""Runs in a worktree; uses nothing that a later commit may rename but what is documented as fixed."""

TINY = """
name: tiny
output_dir: outputs
data:
  manifest: tiny/manifest.csv
  buckets: [{num_frames: 5, height: 32, width: 32, fps: 8, batch_size: 4}]
codec: {name: pixel}
model: {depth: 2, hidden_size: 48, num_heads: 2, patch_size: [1, 4, 4], input_sq_size: 32, gate_init: 0.5}
flow: {conditioning: {first: 0.3, random: 0.3}}
trainer: {device: cpu}
optimizer: {name: muon, lr: 1.0e-3}
checkpoint: {every: 4}
"""
PARTS = [(1, 1, 4), (2, 2, 8), (2, 1, 12), (1, 1, 16)]
"""Of the resumed run: ranks, sp, and the step that the part ends with."""


class Side:
    """One commit in a worktree."""

    def __init__(self, commit: str, folder: Path) -> None:
        self.commit, self.folder = commit, folder
        self.tree = folder / "tree"
        if not self.tree.exists():
            folder.mkdir(parents=True, exist_ok=True)
            git("worktree", "prune")
            git("worktree", "add", "--detach", str(self.tree), commit)

    def command(self, argv: Sequence[str], ranks: int = 1) -> list[str]:
        """A Python command on one process, or on several through torchrun."""
        if ranks == 1:
            return [sys.executable, *argv]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        return [sys.executable, *launcher, *argv]

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(self.tree), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}

    def run(self, *argv: str, ranks: int = 1) -> str:
        """What a command prints. Raises UserError if it fails."""
        done = subprocess.run(
            self.command(argv, ranks),
            cwd=self.tree,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        if done.returncode:
            raise UserError(
                f"{self.commit}: {' '.join(argv)[:200]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        return done.stdout


def shapes(side: Side, args: argparse.Namespace) -> dict[str, Any]:
    """Hash of every file of the embedded data set."""
    side.run("scripts/make_shapes.py", "--output", "data/shapes", "--num_clips", str(args.clips))
    files = sorted(
        file for file in (side.tree / "data/shapes").rglob("*") if file.suffix in (".csv", ".txt", ".mp4")
    )
    return {"files": len(files), "hash": digest(files)}


def quickstart(side: Side, args: argparse.Namespace) -> dict[str, Any]:
    """Losses, gradient norms and learning rates of the first steps, with the real settings."""
    shapes(side, args)
    metrics = side.tree / "outputs/quickstart/metrics.jsonl"
    argv = ["train.py", "--config", "configs/train/quickstart.yaml"]
    log = (side.folder / "quickstart.log").open("w")
    process = subprocess.Popen(
        side.command(argv), cwd=side.tree, env=side.environment, stdout=log, stderr=log
    )
    begin = time.monotonic()
    while len(lines(metrics)) < args.steps and process.poll() is None and time.monotonic() - begin < LIMIT:
        time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.wait(LIMIT)
    if len(lines(metrics)) < args.steps:
        raise UserError(f"{side.commit}: the quickstart ended early: see {log.name}")
    return numbers(metrics, args.steps)


def golden(side: Side, args: argparse.Namespace) -> dict[str, Any]:
    """Hash of output and gradients of each golden case."""
    output = side.run("-c", GOLDEN)
    return json.loads(output.partition("RESULT ")[2])


def parity(side: Side, args: argparse.Namespace) -> dict[str, Any]:
    """The differences that scripts/parity.py prints for two ranks that share each video."""
    shapes(side, args)
    settings = ["--config", "configs/train/quickstart.yaml", "--trainer.matmul_precision", "highest"]
    output = side.run("scripts/parity.py", *settings, "--parallel.sp", "2", ranks=2)
    return {"differences": re.findall(r"\b\d\.\de[-+]\d\d\b", output)}


def resume(side: Side, args: argparse.Namespace) -> dict[str, Any]:
    """A run that is resumed on other splits of ranks: every step, and the exported weights."""
    side.run("scripts/make_shapes.py", "--output", "tiny", "--num_clips", "12")
    (side.tree / "tiny.yaml").write_text(TINY)
    for ranks, sp, steps in PARTS:
        argv = ["train.py", "--config", "tiny.yaml", "--trainer.steps", str(steps), "--parallel.sp", str(sp)]
        side.run(*argv, ranks=ranks)
    run_folder = side.tree / "outputs/tiny"
    weights = sorted((run_folder / "pipeline/transformer").glob("*.safetensors"))
    return {**numbers(run_folder / "metrics.jsonl", PARTS[-1][2]), "weights": digest_tensors(weights)}


CHECKS: dict[str, Callable[[Side, argparse.Namespace], dict[str, Any]]] = {
    check.__name__: check for check in (golden, resume, shapes, parity, quickstart)
}


def lines(file: Path) -> list[str]:
    """Whole lines of a file that may still be written."""
    return file.read_text().split("\n")[:-1] if file.exists() else []


def numbers(metrics: Path, steps: int) -> dict[str, Any]:
    """Loss, gradient norm and learning rate of the first steps, as text that keeps every bit."""
    rows = [json.loads(line) for line in lines(metrics)][:steps]
    return {f"step {row['step']}": [repr(row[key]) for key in ("loss", "grad_norm", "lr")] for row in rows}


def digest(files: Sequence[Path]) -> str:
    """One hash of the names and contents of files."""
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode() + file.read_bytes())
    return total.hexdigest()


def digest_tensors(files: Sequence[Path]) -> dict[str, str]:
    """Hash of every tensor of safetensors files, whatever their headers say beside."""
    from safetensors.torch import load_file

    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in sorted(tensors.items())
    }


def git(*argv: str) -> str:
    """Output of a git command in this repository. Raises UserError if it fails."""
    done = subprocess.run(["git", *argv], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"git {' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout.strip()


def measured(commit: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Results of the checks of a commit, those of earlier calls included."""
    folder = Path(args.output).resolve() / commit[:12]
    file = folder / f"results-{args.steps}-{args.clips}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    side = Side(commit, folder)
    for name in args.only:
        if name not in results:
            begin = time.monotonic()
            results[name] = CHECKS[name](side, args)
            file.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{commit[:12]} {name}: {time.monotonic() - begin:.0f} s", flush=True)
    return results


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("old", help="a commit")
    parser.add_argument(
        "new", nargs="?", default="HEAD", help="a commit; default HEAD (uncommitted changes do not count)"
    )
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS), help="checks to run")
    parser.add_argument("--steps", type=int, default=50, help="steps of the quickstart")
    parser.add_argument("--clips", type=int, default=10_000, help="clips of the quickstart's data set")
    parser.add_argument("--output", default="outputs/compare", help="folder of worktrees and results")
    args = parser.parse_args()
    old, new = (git("rev-parse", "--verify", f"{commit}^{{commit}}") for commit in (args.old, args.new))
    before, after = measured(old, args), measured(new, args)
    differing = 0
    for name in args.only:
        odd = [
            key for key in {**before[name], **after[name]} if before[name].get(key) != after[name].get(key)
        ]
        differing += bool(odd)
        count = len(before[name])
        verdict = f"{len(odd)} of {count} differ, first: {odd[0]}" if odd else f"{count} equal, bit for bit"
        print(f"{name:<12} {verdict}")
    print("the numbers are the same" if not differing else "the numbers are NOT the same")
    return 1 if differing else 0


if __name__ == "__main__":
    run(main)
