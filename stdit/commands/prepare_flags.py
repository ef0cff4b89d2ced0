"""Prepare a folder of videos for training, in steps.

    python scripts/prepare_data.py probe clips clips/probed.csv
    python scripts/prepare_data.py split clips/probed.csv clips/scenes.csv --min_seconds 2 --max_seconds 10
    python scripts/prepare_data.py score clips/scenes.csv clips/scored.csv
    python scripts/prepare_data.py filter clips/scored.csv clips/good.csv --where "motion > 2 and height >= 240"
    python scripts/prepare_data.py dedupe clips/good.csv clips/manifest.csv
    python scripts/prepare_data.py caption clips/manifest.csv clips/captioned.csv --model CAPTION_MODEL_FOLDER
    python scripts/prepare_data.py report clips/manifest.csv clips/report.html --config train/own-clips
    python scripts/prepare_data.py encode --config train/own-clips --data.manifest clips/manifest.csv
    python scripts/prepare_data.py cache verify clips/stdit-cache
    python scripts/prepare_data.py cache prune clips/stdit-cache --config outputs/clips/config.yaml

A source is a folder of videos or a manifest; the output is a manifest with all its columns, in CSV, JSON lines or
Parquet. Rows that a step excludes are listed in a table beside it (clips/scored.excluded.csv), each with the reason.
The same command resumes an interrupted step. Original files are never changed. `prepare_data.py STEP --help` lists
the flags of a step.
"""

from argparse import ArgumentParser
from pathlib import Path

from stdit.cli import ScriptParser, add_import, script_parser

ENCODE_USAGE = "%(prog)s [--part K/N] [--config FILE ...] [--key value ...]"
DEFAULT_SCORES = ("motion", "difference", "sharpness", "brightness", "contrast")
TIMEOUT = 300.0
SPLIT_TIMEOUT = 3600.0
"""Seconds per clip; longer for split, which decodes whole films."""


def build_parser() -> ScriptParser:
    """Return the parser of all steps; imports neither torch nor PyAV."""
    parser = script_parser(__doc__)
    steps = parser.add_subparsers(dest="command", required=True, metavar="STEP")

    def add_step(
        name: str,
        text: str,
        output: str = "a manifest: .csv, .jsonl or .parquet",
        timeout: float | None = TIMEOUT,
    ) -> ArgumentParser:
        """Add a step; one with no ``timeout`` opens no clip, and has no flags of processes."""
        step = steps.add_parser(name, help=text, description=text, allow_abbrev=False)
        step.add_argument("source", help="a folder of videos, a manifest, or tar shards")
        step.add_argument("output", type=Path, help=output)
        step.add_argument("--root", help="folder that paths are relative to; default: the source's folder")
        if timeout is not None:
            step.set_defaults(usual_timeout=timeout)
            step.add_argument(
                "--workers", type=int, default=None, help="processes (one per core); 0: only this one"
            )
            step.add_argument(
                "--timeout",
                type=float,
                metavar="SECONDS",
                help=f"per clip, after which it is excluded ({timeout:g}); 0: no limit. Needs --workers 1 or more",
            )
        step.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
        return step

    probing = add_step("probe", "Fill in size, length, colour, field order and damage from the files.")
    probing.add_argument(
        "--quick", action="store_true", help="decode a few frames of a file, not all: damage is not found"
    )

    split = add_step(
        "split", "Write a row per scene: columns start and end, in seconds.", timeout=SPLIT_TIMEOUT
    )
    split.add_argument(
        "--detector",
        choices=["adaptive", "content"],
        default="adaptive",
        help="of PySceneDetect (%(default)s)",
    )
    split.add_argument("--threshold", type=float, help="of the detector; default: PySceneDetect's")
    split.add_argument(
        "--min_seconds", type=float, default=1.0, help="shorter scenes are excluded (%(default)g)"
    )
    split.add_argument("--max_seconds", type=float, help="longer scenes are divided into equal parts")
    split.add_argument(
        "--cut", type=Path, metavar="FOLDER", help="write a file per scene, copied where possible"
    )

    score = add_step("score", "Add columns of scores: motion, sharpness, and others.")
    score.add_argument(
        "--scores",
        nargs="*",
        default=DEFAULT_SCORES,
        metavar="NAME",
        help=f"default: {' '.join(DEFAULT_SCORES)}; also: text_area, text (needs --model), and your own",
    )
    add_model(score, "of --scores text: a CLIP-like model of transformers, as a local folder or hub id")
    add_import(
        score, "a module of yours that calls stdit.data.preparation.scoring.register_scorer; repeatable"
    )
    score.add_argument(
        "--frames", type=int, default=32, help="frames from the middle of a clip (%(default)s)"
    )
    score.add_argument("--fps", type=float, default=8.0, help="of these frames (%(default)g)")
    score.add_argument(
        "--side", type=int, default=256, help="pixels of their longer side, at most (%(default)s)"
    )

    keep = add_step("filter", "Keep the rows that fulfil a condition.", timeout=None)
    keep.add_argument("--where", required=True, help="such as \"motion > 2 and camera in ('pan', 'tilt')\"")

    dedupe = add_step(
        "dedupe", "Of clips that look alike, keep the best: with a caption, then of most frames x pixels."
    )
    dedupe.add_argument(
        "--distance", type=float, default=4.0, help="bits of 64 by which duplicates may differ (%(default)g)"
    )

    caption = add_step("caption", "Write captions for clips without one, with a model of transformers.")
    add_model(caption, "an image- or video-to-text model: a local folder or hub id", required=True)
    caption.add_argument(
        "--template", help="prompt of the model; {name} stands for a column of the row, such as {camera}"
    )
    caption.add_argument("--frames", type=int, default=8, help="of a clip, at most (%(default)s)")
    caption.add_argument(
        "--side", type=int, default=448, help="pixels of their longer side, at most (%(default)s)"
    )
    caption.add_argument(
        "--max_new_tokens", type=int, default=128, help="of a caption, at most (%(default)s)"
    )
    caption.add_argument("--replace", action="store_true", help="also replace the captions that clips have")

    report = add_step("report", "Write a page of distributions and thumbnails.", output="a page: .html")
    report.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="of a training, to show what its buckets would keep; repeatable",
    )
    add_import(report, "a module of yours that the config needs; repeatable")
    report.add_argument("--thumbnails", type=int, default=48, help="pictures of clips (%(default)s)")

    text = "Encode all clips and captions of a training into its cache. Takes the settings of a training."
    encode = steps.add_parser("encode", help=text, description=text, allow_abbrev=False, usage=ENCODE_USAGE)
    encode.add_argument(
        "--part",
        default="1/1",
        metavar="K/N",
        help="the K-th of N commands that share the work (%(default)s)",
    )

    cache = steps.add_parser("cache", help="Verify or prune a cache.", allow_abbrev=False)
    actions = cache.add_subparsers(dest="action", required=True, metavar="ACTION")
    verify = actions.add_parser("verify", help="Read and check all entries.", allow_abbrev=False)
    prune = actions.add_parser(
        "prune", help="Remove what is broken, and what no --config uses.", allow_abbrev=False
    )
    for action in (verify, prune):
        action.add_argument("folder", type=Path, help="of the cache")
    prune.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="of a training whose entries and fitted codec are kept; repeatable; default: keep all",
    )
    add_import(prune, "a module of yours that a config needs; repeatable")
    prune.add_argument("--dry_run", action="store_true", help="only show what would be removed")
    return parser


def add_model(parser: ArgumentParser, text: str, required: bool = False) -> None:
    """Add the flags of a model: --model, and how it computes."""
    parser.add_argument("--model", metavar="PATH", required=required, help=text)
    parser.add_argument("--batch_size", type=int, help="clips per call of the model (8)")
    parser.add_argument(
        "--device", help="of the model: cpu, cuda, cuda:1, ...; default: a GPU if there is one"
    )
    parser.add_argument("--dtype", help="of the model: fp32, bf16, fp16; default: as it is stored; CPU: fp32")
