"""Disturb a training run again and again, and compare what comes of it with an undisturbed one.

    python scripts/chaos/chaos.py                                      # 10 faults on a tiny model
    python scripts/chaos/chaos.py --faults 200 --seed 1 --output outputs/chaos-1
    python scripts/chaos/chaos.py --launcher torchrun --faults 20 --only kill kill_saving flip
    python scripts/chaos/chaos.py --launcher "srun -n {ranks} python train.py" --splits 4x2 8x1 \
        --config my.yaml --trainer.steps 200 --checkpoint.every 20 --parallel.heartbeat_timeout 30

A trial is one run, which faults interrupt and which is started again after each; half of the trials start with
another number of processes, or another split of them, every time. At its end a run must have the losses and weights
of an undisturbed one: bit for bit if all of it ran on one split, else within --tolerance. After each fault, all
processes must end in time and leave none behind, checkpoints with their final names must be whole, and nothing may be
lost but the steps after the newest.

Settings that are not of this script go to train.py; without --config, it trains a tiny model on generated clips.
Every part of every run is a line of OUTPUT/chaos.jsonl, and the same command again goes on after the trials that are
recorded there. Exits with 1 if a promise was broken. Needs Linux; drop_link needs root and the commands ip and tc.
"""

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported: a pool of threads would not survive a fork
sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.bench.sequence import NoLinkError, Place, limited_link, positive
from scripts.chaos.faults import FAULTS
from scripts.chaos.jobs import CommandLauncher, Launcher, WarmLauncher, adopt_orphans, parse_split
from scripts.chaos.log import table
from scripts.chaos.trials import Bench, campaign
from stdit.cli import run, script_parser
from stdit.errors import UserError
from stdit.training.config import parse_train

SPLITS = ["1x1", "2x1", "1x2", "2x2", "4x1", "2x1:sharded"]
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that jobs and links are ended, too
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
        place, faults = link(stack, launcher, args.only)
        parts, verdicts = campaign(
            Bench(
                launcher,
                argv,
                config.trainer.steps,
                args.output,
                splits,
                faults,
                args.limit,
                args.tolerance,
                place,
            ),
            args.seed,
            args.faults,
        )
    print(table(parts, verdicts))
    broken = sum(bool(part.wrong) for part in parts) + sum(bool(verdict.wrong) for verdict in verdicts)
    print(f"{broken} times a promise was broken" if broken else "every promise was kept")
    return 1 if broken else 0


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """Arguments of this script, and those of train.py."""
    parser = script_parser(__doc__)
    parser.add_argument("--faults", type=positive, default=10, help="that strike, in all trials (10)")
    parser.add_argument("--seed", type=int, default=0, help="decides which, when and on how many ranks (0)")
    parser.add_argument(
        "--only", choices=list(FAULTS), nargs="+", default=list(FAULTS), help="these kinds of faults"
    )
    parser.add_argument(
        "--launcher", default="warm", help="warm, torchrun, python, or a command with {ranks} in it"
    )
    parser.add_argument(
        "--splits", nargs="+", default=SPLITS, help=f"DPxSP or DPxSP:sharded ({' '.join(SPLITS)})"
    )
    parser.add_argument(
        "--limit", type=float, default=240, help="seconds for a job to go on, or to end (240)"
    )
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative, from split to split (1e-5)")
    parser.add_argument("--output", type=Path, default=Path("outputs/chaos"), help="folder (outputs/chaos)")
    args, rest = parser.parse_known_args()
    args.output = args.output.absolute()
    return args, rest


def tiny_config(output: Path) -> Path:
    """A config of a tiny model, with clips and states of captions, which are made if they are not there."""
    clips, text, file = output / "clips", output / "text", output / "tiny.yaml"
    if not file.exists():
        maker = multiprocessing.get_context("fork").Process(target=_make_data, args=(clips, text))
        maker.start()  # a process of its own: no thread may start in this one, which will be forked
        maker.join()
        if maker.exitcode:
            raise UserError(f"no data could be made in {output}: see above")
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


def link(stack: ExitStack, launcher: Launcher, faults: Sequence[str]) -> tuple[Place | None, list[str]]:
    """Two networks with a link to drop, and the faults that can be had; says which cannot, and why."""
    need = [name for name in faults if FAULTS[name].over_link]
    if not need:
        return None, list(faults)
    try:
        if not launcher.takes_places:
            raise NoLinkError("only the warm launcher puts ranks into two networks")
        return stack.enter_context(limited_link("1gbit")), list(faults)
    except NoLinkError as error:
        print(f"{', '.join(need)}: skipped, since {error}")
        return None, [name for name in faults if name not in need]


if __name__ == "__main__":
    run(main)
