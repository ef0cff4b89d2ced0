"""From a folder of videos to a manifest worth training on, in steps.

    python scripts/prepare_data.py probe clips clips/probed.csv
    python scripts/prepare_data.py split clips/probed.csv clips/scenes.csv --min_seconds 2 --max_seconds 10
    python scripts/prepare_data.py score clips/scenes.csv clips/scored.csv
    python scripts/prepare_data.py filter clips/scored.csv clips/good.csv --where "motion > 2 and height >= 240"
    python scripts/prepare_data.py dedupe clips/good.csv clips/manifest.csv
    python scripts/prepare_data.py report clips/manifest.csv clips/report.html --config configs/train/finetune.yaml
    python scripts/prepare_data.py encode --config configs/train/finetune.yaml --data.manifest clips/manifest.csv
    python scripts/prepare_data.py cache verify clips/stdit-cache
    python scripts/prepare_data.py cache prune clips/stdit-cache --config outputs/clips/config.yaml

A source is a folder of videos or a manifest; the output is a manifest with all its columns, in CSV, JSON lines or
Parquet. What a step leaves out is listed with the reason beside its output. An interrupted step goes on where it was
when its command is given again. Original files are never changed. `prepare_data.py STEP --help` lists its flags.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stdit.cli import run, script_parser
from stdit.errors import UserError

ENCODE_USAGE = "%(prog)s [--part K/N] [--config FILE ...] [--key value ...]"
SCORES = ("motion", "difference", "sharpness", "brightness", "contrast")


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args, settings = parser.parse_known_args(argv)
    args.settings = settings
    if settings and args.command != "encode":  # whose further arguments are settings of a training
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    for line in COMMANDS[args.command](args):
        print(line)


def build_parser() -> ArgumentParser:
    parser = script_parser(__doc__)
    steps = parser.add_subparsers(dest="command", required=True, metavar="STEP")

    def step(name: str, text: str, output: str = "a manifest: .csv, .jsonl or .parquet") -> ArgumentParser:
        added = steps.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.add_argument("source", help="a folder of videos, a manifest, or tar shards")
        added.add_argument("output", type=Path, help=output)
        added.add_argument(
            "--root", type=Path, help="what paths are relative to; default: the source's folder"
        )
        added.add_argument(
            "--workers", type=int, default=None, help="processes; 0: none but this; default: a core each"
        )
        added.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
        return added

    step("probe", "Fill in num_frames, fps, height and width from the files.")

    split = step("split", "Make a row of each scene: columns start and end, in seconds.")
    split.add_argument(
        "--detector", choices=["adaptive", "content"], default="adaptive", help="of PySceneDetect"
    )
    split.add_argument("--threshold", type=float, help="of the detector; default: PySceneDetect's")
    split.add_argument("--min_seconds", type=float, default=1.0, help="shorter scenes are left out (1)")
    split.add_argument("--max_seconds", type=float, help="longer scenes are divided into equal parts")
    split.add_argument(
        "--cut", type=Path, metavar="FOLDER", help="write a file of each scene, copied where possible"
    )

    score = step("score", "Add columns that say how clips look.")
    score.add_argument(
        "--scores", nargs="*", default=SCORES, help=f"default: {' '.join(SCORES)}; also: text_area"
    )
    score.add_argument(
        "--scorer", action="append", default=[], metavar="MODULE:FUNCTION",
        help="your own: takes frames uint8 [T H W 3], returns a number or a dict of them; may be repeated",
    )  # fmt: skip
    score.add_argument("--frames", type=int, default=32, help="to look at, from the middle of a clip (32)")
    score.add_argument("--fps", type=float, default=8.0, help="of these frames (8)")
    score.add_argument("--side", type=int, default=256, help="pixels of their longer side, at most (256)")

    chosen = step("filter", "Keep the rows that fulfil a condition.")
    chosen.add_argument("--where", required=True, help="such as \"motion > 2 and camera in ('pan', 'tilt')\"")

    dedupe = step("dedupe", "Of clips that look alike, keep the one with most frames x pixels.")
    dedupe.add_argument(
        "--distance", type=float, default=4.0, help="bits of 64 by which hashes may differ (4)"
    )

    report = step("report", "Show what there is on a page.", output="a page: .html")
    report.add_argument(
        "--config",
        action="append",
        default=[],
        help="of a training, whose buckets are shown; may be repeated",
    )
    report.add_argument("--thumbnails", type=int, default=48, help="clips to show a picture of (48)")

    text = "Encode what a training reads, clips and captions, into its cache. Takes the settings of train.py."
    encode = steps.add_parser("encode", help=text, description=text, allow_abbrev=False, usage=ENCODE_USAGE)
    encode.add_argument(
        "--part", default="1/1", metavar="K/N", help="the K-th of N commands that share the work"
    )

    care = steps.add_parser("cache", help="Look after a cache.", allow_abbrev=False)
    actions = care.add_subparsers(dest="action", required=True, metavar="ACTION")
    verify = actions.add_parser("verify", help="Read all of it, and name what is broken.", allow_abbrev=False)
    prune = actions.add_parser("prune", help="Remove what is broken or not needed.", allow_abbrev=False)
    for action in (verify, prune):
        action.add_argument("folder", type=Path, help="of the cache")
    prune.add_argument(
        "--config", action="append", default=[], help="of a training whose entries stay; repeatable"
    )
    prune.add_argument("--dry_run", action="store_true", help="only say what would go")
    return parser


def task(args: Namespace) -> Any:
    import os

    from stdit.data.preparation.flow import Task

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = cores if args.workers is None else args.workers
    return Task(args.source, args.output, args.root, workers, args.overwrite)


def probe(args: Namespace) -> list[str]:
    from stdit.data.preparation.probing import probe_clips

    return probe_clips(task(args))


def split(args: Namespace) -> list[str]:
    from stdit.data.preparation.scenes import SceneConfig, split_clips

    config = SceneConfig(args.detector, args.threshold, args.min_seconds, args.max_seconds)
    return split_clips(task(args), config, args.cut)


def score(args: Namespace) -> list[str]:
    from stdit.data.preparation.scoring import View, score_clips

    return score_clips(task(args), args.scores, args.scorer, View(args.frames, args.fps, args.side))


def filter_rows(args: Namespace) -> list[str]:
    from stdit.data.preparation.filtering import filter_clips

    return filter_clips(task(args), args.where)


def dedupe(args: Namespace) -> list[str]:
    from stdit.data.preparation.duplicates import dedupe_clips

    return dedupe_clips(task(args), args.distance)


def report(args: Namespace) -> list[str]:
    from stdit.data.preparation.report import report_clips

    data, seed = None, 0
    if args.config:
        from stdit.training.config import parse_train

        files = [flag for name in args.config for flag in ("--config", name)]
        train = parse_train([*files, "--data.sources=[]", "--data.manifest", args.source])
        data, seed = train.data, train.seed
    return report_clips(task(args), data, seed, args.thumbnails)


def encode(args: Namespace) -> list[str]:
    from stdit.training.config import parse_train

    part = read_part(args.part)
    config = parse_train(args.settings)

    from stdit.parallel.processes.device import find_device
    from stdit.training.caching import encode as fill

    summary = fill(config, find_device(config.trainer.device), part)
    hint = ["train with --data.cache disk (or memory) to read it"] if config.data.cache == "none" else []
    return [str(summary), *hint]


def read_part(text: str) -> tuple[int, int]:
    """(number from 0 on, of how many). Raises UserError."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"--part {text}: must be K/N, such as 1/4 to 4/4 for four commands")
    return int(number) - 1, int(count)


def cache(args: Namespace) -> list[str]:
    if args.action == "verify":
        from stdit.data.cache.care import verify

        found = verify(args.folder)
        if found.broken:
            raise UserError(f"{found}\nprune removes what is broken; encode, or training, makes it again")
        return [str(found)]

    from stdit.training.config import parse_train

    configs = [parse_train(["--config", name]) for name in args.config]

    from stdit.training.caching import prune_cache

    return [str(prune_cache(args.folder, configs, args.dry_run))]


COMMANDS: dict[str, Callable[[Namespace], list[str]]] = {
    "probe": probe,
    "split": split,
    "score": score,
    "filter": filter_rows,
    "dedupe": dedupe,
    "report": report,
    "encode": encode,
    "cache": cache,
}

if __name__ == "__main__":
    run(main)
