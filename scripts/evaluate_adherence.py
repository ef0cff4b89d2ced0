"""Score how well videos follow their prompts: shape, colour, motion and background, read off the pixels.

    python scripts/evaluate_adherence.py --videos outputs/quickstart/samples
    python scripts/evaluate_adherence.py --checkpoint outputs/quickstart --output scores.json
    python scripts/evaluate_adherence.py --checkpoint outputs/quickstart --prompts my_prompts.csv
    python scripts/evaluate_adherence.py --checkpoint outputs/given --given first last --given_frames 4

--videos scores what sample.py wrote: every .mp4 with its prompt in the .json beside it. --checkpoint samples
each prompt of the files itself. Files of prompts (columns prompt,shape,colour,motion,background) say what is
expected. With --given, each video has the first or last frames (or both) of a clip that is rendered after its prompt,
and "kept" says in how many these come out as they went in (within 8 of 255 levels, on average).
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

from stdit.cli import run, script_parser
from stdit.data.shapes.checker import ATTRIBUTES, Verdict, check, compare
from stdit.data.shapes.render import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, render, sample_scene
from stdit.errors import UserError
from stdit.pipelines.sampling import find_device, writable
from stdit.pipelines.video_io import write_json

DATA = Path("data/shapes")
SETS = ("heldout", "paraphrase", "paraphrase_strict", "seen")
COLUMNS = ("prompt", *ATTRIBUTES)
VALUES: dict[str, tuple[str, ...]] = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "motion": MOTIONS,
    "background": tuple(BACKGROUNDS),
}
KEPT = 8
"""Mean difference, of 255 levels, up to which given frames have come out as they went in."""

Expected = dict[str, Any]
"""One prompt: its text, its attributes and the name of its set."""


def read_expected(files: list[Path]) -> list[Expected]:
    """Prompts of all files; a set is named like its file, without "prompts_"."""
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
    """Every video of a folder whose prompt is expected, as uint8 [T H W 3], with its file's name."""
    from stdit.data.decoding.decode import DecodeError, decode_clip, probe

    by_prompt = {row["prompt"]: row for row in reversed(expected)}
    paths = sorted(folder.glob("*.mp4"))
    if not paths:
        raise UserError(f"{folder} holds no .mp4: --videos takes the output folder of sample.py")
    left_out = []
    for path in tqdm(paths, desc="checking", unit="video", disable=None):
        try:
            row = by_prompt[json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["prompt"]]
        except (OSError, ValueError, KeyError):
            left_out.append(path.name)
            continue
        try:
            info = probe(path)
            frames = decode_clip(path, info.num_frames, info.fps, info.height, info.width)
        except DecodeError as error:
            raise UserError(f"{error}: sample it again, or take it away") from error
        yield row, path.name, frames.permute(0, 2, 3, 1).numpy()
    if len(left_out) == len(paths):
        raise UserError(f"{folder}: no video has a .json beside it with a prompt of the --prompts files")
    if left_out:
        print(f"{len(left_out)} of {len(paths)} videos have no known prompt: {', '.join(left_out[:3])}, ...")


def sample_videos(
    args: argparse.Namespace, expected: list[Expected]
) -> Iterator[tuple[Expected, str, np.ndarray]]:
    """Sample every prompt: uint8 [T H W 3]. Prompt i starts from noise of seed `args.seed` + i."""
    import torch

    from stdit.pipelines.conditions import Condition
    from stdit.pipelines.loading import load_pipeline

    device = find_device(args.device)
    pipe, _ = load_pipeline(args.checkpoint)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    settings = {name: value for name, value in settings.items() if value is not None}
    clips = (
        [rendered(row, args.seed + index, args) for index, row in enumerate(expected)] if args.given else []
    )
    places = {"first": slice(0, args.given_frames), "last": slice(-args.given_frames, None)}
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
                [Condition(to_tensor(clip[places[end]]), places[end].start) for end in args.given]
                for clip in clips[start : start + args.batch_size]
            ],
            output_type="np",
            **settings,
        ).frames  # [B T H W 3]
        for index, (row, seed, video) in enumerate(zip(rows, seeds, videos, strict=True), start):
            frames = (np.asarray(video) * 255).round().clip(0, 255).astype(np.uint8)
            for end in args.given:
                error = np.abs(frames[places[end]].astype(int) - clips[index][places[end]]).mean()
                row = {**row, "given_error": max(float(error), row.get("given_error", 0.0))}
            yield row, f"seed {seed}", frames
        progress.update(len(rows))
    progress.close()


def rendered(row: Expected, seed: int, args: argparse.Namespace) -> np.ndarray:
    """A clip as a prompt describes it, uint8 [T H W 3]."""
    combo = tuple(row[name] for name in ("shape", "colour", "motion"))
    scene = replace(sample_scene(np.random.default_rng(seed), [combo]), background=row["background"])
    return render(scene, args.num_frames, args.size)


def to_tensor(frames: np.ndarray) -> Any:
    """uint8 [T H W 3] to float [3 T H W] in [-1, 1]."""
    import torch

    return torch.from_numpy(frames.copy()).movedim(-1, 0).float() / 127.5 - 1


def judge(row: Expected, source: str, frames: np.ndarray) -> dict[str, Any]:
    """What was expected, what was seen, and which of it is right."""
    verdict: Verdict = check(frames)
    kept = {"kept": row["given_error"] <= KEPT} if "given_error" in row else {}
    return {**row, "source": source, "seen": asdict(verdict), "right": compare(verdict, row) | kept}


def summarise(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Fraction of videos of each set in which an attribute, or all of them, is right; see `checker.compare`."""
    summary: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(result["set"] for result in results):
        rights = [result["right"] for result in results if result["set"] == name]
        fractions = {key: sum(right[key] for right in rights) / len(rights) for key in rights[0]}
        summary[name] = {"n": len(rights), **fractions}
    return summary


def print_table(summary: dict[str, dict[str, float]]) -> None:
    keys = [key for key in next(iter(summary.values())) if key != "n"]
    print(f"{'set':<18} {'n':>4}" + "".join(f" {key:>13}" for key in keys))
    for name, row in summary.items():
        print(f"{name:<18} {row['n']:>4}" + "".join(f" {row[key]:>13.1%}" for key in keys))


def main() -> None:
    parser = script_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--videos", type=Path, metavar="DIR", help="output folder of sample.py")
    source.add_argument("--checkpoint", type=Path, metavar="RUN", help="run, checkpoint or pipeline folder")
    parser.add_argument("--prompts", type=Path, nargs="+", metavar="CSV", help=f"default: those of {DATA}")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write scores and every verdict here")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt (%(default)s)")
    parser.add_argument("--num_frames", type=int, default=16, help="%(default)s")
    parser.add_argument("--size", type=int, default=32, help="height and width in pixels (%(default)s)")
    ends = ["first", "last"]
    parser.add_argument(
        "--given", nargs="+", choices=ends, default=[], help="frames of a clip that are given"
    )
    parser.add_argument("--given_frames", type=int, default=4, help="at each end (%(default)s)")
    parser.add_argument("--num_inference_steps", type=int, help="default: the pipeline's")
    parser.add_argument("--guidance_scale", type=float, help="default: the pipeline's")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts at a time (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto: a GPU if there is one")
    args = parser.parse_args()
    if args.batch_size < 1:
        raise UserError(f"batch_size = {args.batch_size}: must be at least 1")
    if args.given and not (args.checkpoint and 0 < args.given_frames * len(args.given) < args.num_frames):
        raise UserError(
            f"--given takes --checkpoint, and given_frames = {args.given_frames} at each end that leave some of "
            f"num_frames = {args.num_frames} to make"
        )
    if args.output:
        writable(args.output.absolute().parent)

    names = ("sample", *SETS) if args.videos else SETS
    expected = read_expected(args.prompts or [DATA / f"prompts_{name}.csv" for name in names])
    videos = read_videos(args.videos, expected) if args.videos else sample_videos(args, expected)
    results = [judge(*video) for video in videos]
    scores = summarise(results)
    print_table(scores)
    if args.output:
        write_json(args.output, {"scores": scores, "videos": results})


if __name__ == "__main__":
    run(main)
