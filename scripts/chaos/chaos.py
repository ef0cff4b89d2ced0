"""Disturb a training run by faults again and again, and compare its result with that of an undisturbed run.

    python scripts/chaos/chaos.py                                      # 10 faults on a tiny model
    python scripts/chaos/chaos.py --faults 200 --seed 1 --output outputs/chaos-1
    python scripts/chaos/chaos.py --launcher torchrun --faults 20 --only kill kill_saving flip
    python scripts/chaos/chaos.py --launcher "srun -n {ranks} python train.py" --splits 4x2 8x1 \
        --config my.yaml --trainer.steps 200 --checkpoint.every 20 --parallel.heartbeat_timeout 30

A trial is one run that is started again after each fault; half of the trials change the number of processes, or how
they share the work, at every start. At its end a run must have the losses and weights of an undisturbed one: bit for
bit if all of it ran on one split, else within --tolerance. After each fault, all processes must end in time, none may
be left behind, checkpoints with their final names must be complete, and only the steps after the newest may be lost.

All other settings are passed to train.py; without --config, it trains a tiny model on generated clips. Every start
of every run is a line of OUTPUT/chaos.jsonl; the same command resumes after the trials that are recorded there. Exits
with 1 if a promise was broken. Needs Linux; drop_link needs root and the commands ip and tc. See README.md
beside this file.
"""

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: its threads do not survive a fork
sys.path.insert(0, str(Path(__file__).parents[2]))  # where scripts.* is found

from scripts.arguments import positive_int
from scripts.chaos.faults import FAULTS
from scripts.chaos.jobs import CommandLauncher, Launcher, WarmLauncher, adopt_orphans, parse_split
from scripts.chaos.log import table
from scripts.chaos.trials import Setup, run_trials
from scripts.network import Network, NoLinkError, limited_link
from stdit.cli import run, script_parser
from stdit.errors import UserError
from stdit.training.config import parse_train

SPLITS = ["1x1", "2x1", "1x2", "1x1x2", "2x2", "1x2x2", "4x1", "2x1:sharded"]
TINY = """
data: {{manifest: {clips}/manifest.csv, buckets: [{{num_frames: 4, height: 32, width: 32, fps: 8, batch_size: 4}}]}}
text_encoder: {{name: stored, path: {text}}}
model: {{depth: 1, hidden_size: 48, num_heads: 2, patch_size: [1, 8, 8], input_sq_size: 32}}
flow: {{conditioning: {{first: 0.3}}}}
trainer: {{steps: 48, device: cpu}}
optimizer: {{lr: 1.0e-4}}
parallel: {{timeout: 30, heartbeat_timeout: 15}}
checkpoint: {{every: 2, keep_last: 3}}
"""
"""A run of a few seconds that saves often."""


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that jobs are ended and links removed
    args, argv = parse_args()
    adopt_orphans()
    launcher = WarmLauncher() if args.launcher == "warm" else CommandLauncher(args.launcher)
    if not any(flag.partition("=")[0] == "--config" for flag in argv):
        argv = ["--config", str(tiny_config(args.output)), *argv]
    config, splits = parse_train(argv), [parse_split(text) for text in args.splits]
    if config.checkpoint.keep_last < 2:
        raise UserError(
            "checkpoint.keep_last = 1: must be at least 2, so that a damaged checkpoint can be skipped"
        )
    with ExitStack() as stack:
        network, faults = link(stack, launcher, args.only)
        attempts, verdicts = run_trials(
            Setup(
                launcher,
                argv,
                config.trainer.steps,
                args.output,
                splits,
                faults,
                args.limit,
                args.tolerance,
                network,
            ),
            args.seed,
            args.faults,
        )
    print(table(attempts, verdicts))
    broken = sum(bool(attempt.violations) for attempt in attempts) + sum(
        bool(verdict.violations) for verdict in verdicts
    )
    print(f"{broken} times a promise was broken" if broken else "every promise was kept")
    return 1 if broken else 0


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """Parse this script's arguments; return them and those of train.py."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "--faults", type=positive_int, default=10, help="faults to strike, in all trials (10)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="decides which fault strikes when, and on how many ranks (0)"
    )
    parser.add_argument(
        "--only", choices=list(FAULTS), nargs="+", default=list(FAULTS), help="kinds of faults (all)"
    )
    parser.add_argument(
        "--launcher", default="warm", help="warm, torchrun, python, or a command with {ranks} in it"
    )
    parser.add_argument(
        "--splits",
        nargs="+",
        default=SPLITS,
        help=f"DPxSP or DPxTIMExSPACE, perhaps :sharded ({' '.join(SPLITS)})",
    )
    parser.add_argument(
        "--limit", type=float, default=240, help="seconds for a job to make progress, or to end (240)"
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="relative difference allowed between splits (1e-5)"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/chaos"), help="folder (outputs/chaos)")
    args, rest = parser.parse_known_args()
    args.output = args.output.absolute()
    return args, rest


def tiny_config(output: Path) -> Path:
    """Return the config of a tiny model; make it, its clips and its text states if they do not exist."""
    clips, text, file = output / "clips", output / "text", output / "tiny.yaml"
    if not file.exists():
        maker = multiprocessing.get_context("fork").Process(target=_make_data, args=(clips, text))
        maker.start()  # in a process of its own, since this one will be forked and must start no thread
        maker.join()
        if maker.exitcode:
            raise UserError(f"the data in {output} could not be made: see above")
        file.write_text(TINY.format(clips=clips, text=text), encoding="utf-8")
    return file


def _make_data(clips: Path, text: Path) -> None:
    from stdit.codecs import build_text_encoder
    from stdit.codecs.config import TextEncoderConfig
    from stdit.codecs.stored_text import store_text
    from stdit.data.manifest.reading import read_texts
    from stdit.data.shapes.build import ShapesConfig, build

    build(clips, ShapesConfig(num_clips=12, num_frames=4), workers=1)
    encoder = build_text_encoder(TextEncoderConfig())
    for _ in store_text(encoder, ["", *read_texts(clips / "manifest.csv")], text):
        pass


def link(stack: ExitStack, launcher: Launcher, faults: Sequence[str]) -> tuple[Network | None, list[str]]:
    """Make a network whose link can be dropped, and return it with the faults that are possible here."""
    need = [name for name in faults if FAULTS[name].over_link]
    if not need:
        return None, list(faults)
    try:
        if not launcher.takes_networks:
            raise NoLinkError("only the warm launcher runs ranks in network namespaces")
        return stack.enter_context(limited_link("1gbit")), list(faults)
    except NoLinkError as error:
        print(f"{', '.join(need)}: skipped: {error}")
        return None, [name for name in faults if name not in need]


if __name__ == "__main__":
    run(main)
