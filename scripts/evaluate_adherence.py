"""Score how well videos follow their prompts: shape, colour, motion and background, recognised from the pixels.

    python scripts/evaluate_adherence.py --videos outputs/quickstart/samples
    python scripts/evaluate_adherence.py --checkpoint outputs/quickstart --output scores.json
    python scripts/evaluate_adherence.py --checkpoint outputs/quickstart --prompts my_prompts.csv
    python scripts/evaluate_adherence.py --checkpoint outputs/i2v --conditioning first last --conditioning_frames 4

--videos scores what sample.py wrote: every .mp4 with its prompt in the .json beside it. --checkpoint samples every
prompt of the prompt files itself. Prompt files (columns prompt,shape,colour,motion,background) say what is expected.

The scores are, per prompt file, n (videos) and the share of them, from 0 to 1, in which each attribute is right.
"strict" and "lenient": all four are right, the shape by the strict or the lenient rule of data/shapes/checker.py.
With --conditioning, each video is conditioned on the first or last frames (or both) of a clip that is rendered from
its prompt, and "kept" is the share in which these frames come out unchanged: within 8 of 255 levels, on average.
"""

import argparse
import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stdit.cli import import_modules, run, script_parser
from stdit.data.shapes.checker import ATTRIBUTES, Verdict, check, compare
from stdit.data.shapes.render import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, render, sample_scene
from stdit.errors import UserError
from stdit.parallel.processes.device import find_device
from stdit.pipelines.video_io import write_json_atomic
from stdit.pipelines.writer import check_writable, created_folder

DATA = Path("data/shapes")
SETS = ("heldout", "paraphrase", "paraphrase_strict", "seen")
COLUMNS = ("prompt", *ATTRIBUTES)
VALUES: dict[str, tuple[str, ...]] = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "motion": MOTIONS,
    "background": tuple(BACKGROUNDS),
}
KEPT_LEVELS = 8
"""Largest mean difference, of 255 levels, of conditioning frames that count as kept."""

Expected = dict[str, Any]
"""A prompt: its text, its attributes, and the name of its set."""


def read_expected(files: list[Path]) -> list[Expected]:
    """Read the prompts of all files; each file is a set, named like it without "prompts_". Raises UserError."""
    expected = []
    for path in files:
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; scripts/make_shapes.py writes such files") from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} is not a CSV in UTF-8 ({error}): save it as one") from error
        if not rows or any(row.get(name) in (None, "") for row in rows for name in COLUMNS):
            raise UserError(f"{path} must be a CSV with rows, and with the columns {','.join(COLUMNS)}")
        for attribute, values in VALUES.items():
            if odd := next((row[attribute] for row in rows if row[attribute] not in values), None):
                raise UserError(f"{path}: {attribute} = {odd}: must be one of {', '.join(values)}")
        name = path.stem.removeprefix("prompts_")
        expected += [{"set": name, **{column: row[column] for column in COLUMNS}} for row in rows]
    return expected


def read_videos(folder: Path, expected: list[Expected]) -> Iterator[tuple[Expected, str, np.ndarray]]:
    """Yield a folder's videos whose prompt is expected: (prompt, file name, uint8 [T H W 3]). Raises UserError."""
    from stdit.data.decoding.decode import DecodeError, decode_clip, probe

    by_prompt = {row["prompt"]: row for row in reversed(expected)}
    paths = sorted(folder.glob("*.mp4"))
    if not paths:
        raise UserError(f"{folder} holds no .mp4: --videos takes the output folder of sample.py")
    unknown = []
    for path in tqdm(paths, desc="checking", unit="video", disable=None):
        try:
            row = by_prompt[json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["prompt"]]
        except (OSError, ValueError, KeyError):
            unknown.append(path.name)
            continue
        try:
            info = probe(path)
            frames = decode_clip(path, info.num_frames, info.fps, info.height, info.width)
        except DecodeError as error:
            raise UserError(f"{error}: sample it again, or remove it") from error
        yield row, path.name, frames.permute(0, 2, 3, 1).numpy()
    if len(unknown) == len(paths):
        raise UserError(f"{folder}: no video has a .json beside it with a prompt of the --prompts files")
    if unknown:
        print(f"{len(unknown)} of {len(paths)} videos have no known prompt: {', '.join(unknown[:3])}, ...")


def sample_videos(
    args: argparse.Namespace, expected: list[Expected]
) -> Iterator[tuple[Expected, str, np.ndarray]]:
    """Sample every prompt: (prompt, seed, uint8 [T H W 3]). Prompt i has the seed `args.seed` + i."""
    import torch

    from stdit.pipelines.conditions import FrameCondition
    from stdit.pipelines.loading import load_pipeline

    device = find_device(args.device)
    pipe, _ = load_pipeline(args.checkpoint)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    settings = {name: value for name, value in settings.items() if value is not None}
    clips = (
        [render_prompt(row, args.seed + i, args) for i, row in enumerate(expected)]
        if args.conditioning
        else []
    )
    ends = {"first": slice(0, args.conditioning_frames), "last": slice(-args.conditioning_frames, None)}
    progress = tqdm(total=len(expected), desc="sampling", unit="video", disable=None)
    for start in range(0, len(expected), args.batch_size):
        rows = expected[start : start + args.batch_size]
        seeds = range(args.seed + start, args.seed + start + len(rows))
        videos = pipe(
            prompt=[row["prompt"] for row in rows],
            num_frames=args.num_frames,
            height=args.size,
            width=args.size,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            conditions=[
                [FrameCondition(to_tensor(clip[ends[end]]), ends[end].start) for end in args.conditioning]
                for clip in clips[start : start + args.batch_size]
            ],
            output_type="np",
            **settings,
        ).frames  # [B T H W 3]
        for index, (row, seed, video) in enumerate(zip(rows, seeds, videos, strict=True), start):
            frames = (np.asarray(video) * 255).round().clip(0, 255).astype(np.uint8)
            for end in args.conditioning:
                error = np.abs(frames[ends[end]].astype(int) - clips[index][ends[end]]).mean()
                row = {**row, "conditioning_error": max(float(error), row.get("conditioning_error", 0.0))}
            yield row, f"seed {seed}", frames
        progress.update(len(rows))
    progress.close()


def render_prompt(row: Expected, seed: int, args: argparse.Namespace) -> np.ndarray:
    """Render a clip that a prompt describes: uint8 [T H W 3]."""
    combo = tuple(row[name] for name in ("shape", "colour", "motion"))
    scene = replace(sample_scene(np.random.default_rng(seed), [combo]), background=row["background"])
    return render(scene, args.num_frames, args.size)


def to_tensor(frames: np.ndarray) -> Any:
    """Convert uint8 [T H W 3] to float [3 T H W] in [-1, 1]."""
    import torch

    return torch.from_numpy(frames.copy()).movedim(-1, 0).float() / 127.5 - 1


def judge(row: Expected, source: str, frames: np.ndarray) -> dict[str, Any]:
    """Return what a video should show, what it shows, and which attributes are right."""
    verdict: Verdict = check(frames)
    kept = {"kept": row["conditioning_error"] <= KEPT_LEVELS} if "conditioning_error" in row else {}
    return {**row, "source": source, "seen": asdict(verdict), "right": compare(verdict, row) | kept}


def summarise(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return, per set, the number of videos and the share in which each key of `checker.compare` is right."""
    summary: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(result["set"] for result in results):
        rights = [result["right"] for result in results if result["set"] == name]
        fractions = {key: sum(right[key] for right in rights) / len(rights) for key in rights[0]}
        summary[name] = {"n": len(rights), **fractions}
    return summary


def print_table(summary: dict[str, dict[str, float]]) -> None:
    """Print the shares in percent, one line per set."""
    keys = [key for key in next(iter(summary.values())) if key != "n"]
    print(f"{'set':<18} {'n':>4}" + "".join(f" {key:>13}" for key in keys))
    for name, row in summary.items():
        print(f"{name:<18} {row['n']:>4}" + "".join(f" {row[key]:>13.1%}" for key in keys))


def main() -> None:
    parser = script_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--videos", type=Path, metavar="DIR", help="output folder of sample.py")
    source.add_argument("--checkpoint", type=Path, metavar="RUN", help="run, checkpoint or pipeline folder")
    parser.add_argument(
        "--prompts", type=Path, nargs="+", metavar="CSV", help=f"prompt files; default: those of {DATA}"
    )
    parser.add_argument("--output", type=Path, metavar="JSON", help="file for scores and all verdicts")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt (%(default)s)")
    parser.add_argument("--num_frames", type=int, default=16, help="%(default)s")
    parser.add_argument("--size", type=int, default=32, help="height and width in pixels (%(default)s)")
    parser.add_argument(
        "--conditioning",
        nargs="+",
        choices=["first", "last"],
        default=[],
        help="condition on frames of a clip",
    )
    parser.add_argument("--conditioning_frames", type=int, default=4, help="at each end (%(default)s)")
    parser.add_argument("--num_inference_steps", type=int, help="default: the pipeline's")
    parser.add_argument("--guidance_scale", type=float, help="default: the pipeline's")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts per batch (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto: a GPU if there is one (%(default)s)")
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module of yours that the checkpoint needs; repeatable",
    )
    args = parser.parse_args()
    import_modules(args.imports)
    if args.batch_size < 1:
        raise UserError(f"batch_size = {args.batch_size}: must be at least 1")
    conditioned = args.conditioning_frames * len(args.conditioning)
    if args.conditioning and not (args.checkpoint and 0 < conditioned < args.num_frames):
        raise UserError(
            f"--conditioning needs --checkpoint, and conditioning_frames = {args.conditioning_frames} at each end: "
            f"num_frames = {args.num_frames} must be larger, so that some are left to generate"
        )
    if args.output:
        check_writable(args.output.absolute().parent)

    names = ("sample", *SETS) if args.videos else SETS
    expected = read_expected(args.prompts or [DATA / f"prompts_{name}.csv" for name in names])
    videos = read_videos(args.videos, expected) if args.videos else sample_videos(args, expected)
    results = [judge(*video) for video in videos]
    scores = summarise(results)
    print_table(scores)
    if args.output:
        with created_folder(args.output.absolute().parent):
            write_json_atomic(args.output, {"scores": scores, "videos": results})


if __name__ == "__main__":
    run(main)
