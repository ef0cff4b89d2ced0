"""Score how well videos follow their prompts: shape, colour, motion and background, recognised from the pixels.

    python scripts/evaluate_adherence.py --videos outputs/quickstart/videos --patch 16
    python scripts/evaluate_adherence.py --checkpoint outputs/quickstart --output scores.json
    python scripts/evaluate_adherence.py --checkpoint outputs/quickstart --prompts my_prompts.csv
    python scripts/evaluate_adherence.py
    python scripts/evaluate_adherence.py --checkpoint outputs/i2v --conditioning first last
    python scripts/evaluate_adherence.py --codec outputs/tiny --prompts data/shapes64/prompts_heldout.csv

--videos scores what sample.py wrote: every .mp4 with its prompt in the .json beside it. --checkpoint samples every
prompt of the prompt files itself, and scores what an .mp4 would show, too. --codec scores clips that are rendered
from the prompts, encoded and decoded: the best that a model with this codec can do. Without all three, the model that
comes with stdit is scored.

Without --prompts, the files of data/shapes are used; for a model of 64x64 pixels the prompts of world 64, which are
drawn.

Prompt files (columns prompt,shape,colour,motion,background) say what is expected.
Those of world 64 also have the columns relation,other_shape,other_colour, empty for one object; two have no motion.

The scores are, per prompt file, n (videos) and the share of them, from 0 to 1, in which each attribute is right.
"strict" and "lenient": all are right, shapes by the strict or the lenient rule of data/shapes/checker, and no object
is too many. "noise" is the mean noise of plain backgrounds, in levels of 255 (rms; real clips have about 1).
"borders" is how visible the borders of the model's patches are in plain backgrounds, on average: the mean absolute
difference of neighbouring pixels across borders, divided by that of other neighbours, both of at least one level (1:
not at all; real clips).
A checkpoint says how large its patches are (codec stride times patch size); for --videos, --patch does.
With --conditioning, each video is conditioned on the first or last frames (or both) of a clip that is rendered from
its prompt, and "kept" is the share in which these frames come out unchanged: within 8 of 255 levels, on average.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm import tqdm

from stdit.cli import add_import, import_modules, run, script_parser
from stdit.data.shapes.build import ShapesConfig, draw_prompt_sets
from stdit.data.shapes.checker import background_noise, check, compare, patch_borders
from stdit.data.shapes.prompt_files import Expected, read_expected, render_prompt
from stdit.data.shapes.worlds import World
from stdit.errors import UserError, listed
from stdit.parallel.processes.device import find_device
from stdit.pipelines.config import PIPELINE_DEFAULTS, VideoSettings, check_seed
from stdit.pipelines.loading import CheckpointSource, find_checkpoint_source, load_pipeline, pipeline_settings
from stdit.pipelines.requests import Request
from stdit.pipelines.untrained import warn_of_conditioning, warn_of_sizes
from stdit.pipelines.video_io import to_uint8, write_json_atomic, write_mp4
from stdit.pipelines.writer import check_output_file, created_folder

DATA = Path("data/shapes")
SETS = ("heldout", "paraphrase", "paraphrase_strict", "seen")
PAIR_SETS = ("relations", "relations_paraphrase")
"""Those of a world with relations."""
KEPT_LEVELS = 8
"""Largest mean difference, of 255 levels, of conditioning frames that count as kept."""

MEASURES = {"noise": ".1f", "borders": ".2f"}
"""Scores that are no shares, and how they are printed. A video without a plain background has none."""

SAMPLING = {
    "num_inference_steps": int,
    "guidance_scale": float,
    "shift": float,
    "refine_pairs": int,
    "refine_level": float,
    "refine_guidance_scale": float,
}
"""Settings of a pipeline call that are flags here."""
DEFAULTS = {"seed": 0, "batch_size": 16, "device": "auto"}
LEAST = {"batch_size": 1, "num_frames": 1, "size": 1, "conditioning_frames": 1}
"""Smallest values of flags."""
OF_A_MODEL = ("conditioning", "conditioning_frames", *SAMPLING)
CHANGES = ("num_frames", "size", *OF_A_MODEL)
"""Flags that change how a model's videos are made, and so its scores: the file of scores records them."""
UNUSED = {"codec": ("batch_size", *OF_A_MODEL), "videos": ("batch_size", *CHANGES, "seed", "device")}
"""Flags that have no effect on what another flag scores."""
LEAST_CONDITIONING_FRAMES = 4
"""By default, rounded up to whole latent frames; enough to show a motion."""


def default_files(names: tuple[str, ...]) -> list[Path]:
    """Return the prompt files in `DATA`."""
    pairs = [path for name in PAIR_SETS if (path := DATA / f"prompts_{name}.csv").exists()]
    return [DATA / f"prompts_{name}.csv" for name in names] + pairs


def default_prompts(videos: bool, size: int) -> tuple[World, list[Expected]]:
    """Return the world and the prompts that are scored without --prompts.

    Args:
        videos: a folder of videos is scored, which may be of the prompts for samples.
        size: height in pixels of a model's videos: those of world 64 are scored by its prompts, which need no files.
    """
    config = ShapesConfig.of("64")
    if size != config.facts.size:
        return read_expected(default_files(("sample", *SETS) if videos else SETS))
    sets = draw_prompt_sets(config)
    return config.facts, [{"set": name, **row} for name in (*SETS, *PAIR_SETS) for row in sets[name]]


def read_videos(folder: Path, expected: list[Expected]) -> Iterator[tuple[Expected, str, np.ndarray]]:
    """Yield a folder's videos whose prompt is expected: (prompt, file name, uint8 [T H W 3]). Raises UserError."""
    from stdit.data.decoding.decode import DecodeError

    by_prompt = {row["prompt"]: row for row in reversed(expected)}
    paths = sorted(folder.glob("*.mp4"))
    if not paths:
        raise UserError(f"{folder} holds no .mp4: --videos takes the output folder of sample.py")
    unknown = []
    for path in tqdm(paths, desc="checking", unit="video", disable=None):
        try:
            row = by_prompt[json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["prompt"]]
        except (OSError, ValueError, KeyError, TypeError):
            unknown.append(path.name)
            continue
        try:
            frames = read_mp4(path)
        except DecodeError as error:
            raise UserError(f"{error}: sample it again, or remove it") from error
        yield row, path.name, frames
    if len(unknown) == len(paths):
        raise UserError(f"{folder}: no video has a .json beside it with a prompt of the --prompts files")
    if unknown:
        print(
            f"{len(unknown)} of {len(paths)} videos have no known prompt: {listed(unknown[:3], len(unknown))}"
        )


def read_mp4(path: Path) -> np.ndarray:
    """Decode all frames of a video: uint8 [T H W 3]. Raises DecodeError."""
    from stdit.data.decoding.decode import decode_clip, probe

    info = probe(path)
    frames = decode_clip(path, info.num_frames, info.fps, info.height, info.width)
    return frames.permute(0, 2, 3, 1).numpy()


def load(source: CheckpointSource, device: str) -> tuple[Any, str, tuple[int, int]]:
    """Load the pipeline; return it, the hash of its weights, and height and width of its patches in pixels."""
    on = find_device(device)
    pipe, weights = load_pipeline(source)
    pipe.to(on)
    pipe.set_progress_bar_config(disable=True)
    (_, *stride), (_, *size) = pipe.codec.stride, pipe.transformer.config.patch_size
    return pipe, weights, (stride[0] * size[0], stride[1] * size[1])


def conditioned_frames(args: argparse.Namespace, codec: Any) -> dict[str, slice]:
    """Return the frames that a video is conditioned on, by end.

    By default these are whole latent frames: the rest of one that is given in part becomes a repetition.
    """
    total, given = args.num_frames, args.conditioning_frames

    def is_whole(frames: int) -> bool:
        return bool(codec.pixel_shape(*codec.latent_shape(frames, 1, 1))[0] == frames)

    counts = range(LEAST_CONDITIONING_FRAMES, total)
    whole = {
        "first": next((n for n in counts if is_whole(n)), LEAST_CONDITIONING_FRAMES),
        "last": next((n for n in counts if is_whole(total - n)), LEAST_CONDITIONING_FRAMES),
    }
    return {
        end: slice(0, given or whole[end]) if end == "first" else slice(-(given or whole[end]), None)
        for end in args.conditioning
    }


def sample_videos(
    pipe: Any, args: argparse.Namespace, expected: list[Expected], world: World
) -> Iterator[tuple[Expected, str, np.ndarray]]:
    """Sample every prompt: (prompt, seed, uint8 [T H W 3]), as the .mp4 shows it.

    Prompt i has the seed `args.seed` + i.
    """
    import torch

    from stdit.pipelines.conditions import FrameCondition

    ends = conditioned_frames(args, pipe.codec)
    clips = [
        render_prompt(row, args.seed + i, world, args.num_frames, args.size)
        for i, row in enumerate(expected if ends else [])
    ]
    progress = tqdm(total=len(expected), desc="sampling", unit="video", disable=None)
    for start in range(0, len(expected), args.batch_size):
        rows = expected[start : start + args.batch_size]
        seeds = range(args.seed + start, args.seed + start + len(rows))
        videos = pipe(
            prompt=[row["prompt"] for row in rows],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            conditions=[
                [FrameCondition(to_tensor(clip[frames]), frames.start) for frames in ends.values()]
                for clip in clips[start : start + args.batch_size]
            ],
            output_type="np",
            **sampling_settings(args),
        ).frames  # [B T H W 3]
        for index, (row, seed, video) in enumerate(zip(rows, seeds, videos, strict=True), start):
            frames = to_uint8(np.asarray(video))
            for kept in ends.values():
                error = np.abs(frames[kept].astype(int) - clips[index][kept]).mean()
                row = {**row, "conditioning_error": max(float(error), row.get("conditioning_error", 0.0))}
            yield row, f"seed {seed}", as_mp4(frames, world.fps)
        progress.update(len(rows))
    progress.close()


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the pipeline's calls, by name."""
    given = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    return {"num_frames": args.num_frames, "height": args.size, "width": args.size, **given}


def code_videos(
    folder: Path, args: argparse.Namespace, expected: list[Expected], world: World
) -> Iterator[tuple[Expected, str, np.ndarray]]:
    """Encode and decode a clip of every prompt: (prompt, seed, uint8 [T H W 3]), as the .mp4 shows it."""
    import torch

    from stdit.codecs.base import VideoCodec

    codec = VideoCodec.from_pretrained(folder).to(find_device(args.device))
    for seed, row in enumerate(tqdm(expected, desc="coding", unit="video", disable=None), args.seed):
        video = to_tensor(render_prompt(row, seed, world, args.num_frames, args.size))[None].to(codec.device)
        with torch.no_grad():
            decoded = codec.decode(codec.encode(video), *video.shape[2:])[0]
        frames = to_uint8((decoded.movedim(0, -1).cpu().numpy() + 1) / 2)
        yield row, f"seed {seed}", as_mp4(frames, world.fps)


def as_mp4(frames: np.ndarray, fps: float) -> np.ndarray:
    """Return frames as they are after writing and decoding an .mp4: uint8 [T H W 3]."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_mp4(path, frames, fps)
        return read_mp4(path)


def to_tensor(frames: np.ndarray) -> Any:
    """Convert uint8 [T H W 3] to float [3 T H W] in [-1, 1]."""
    import torch

    return torch.from_numpy(frames.copy()).movedim(-1, 0).float() / 127.5 - 1


def judge(
    row: Expected, source: str, frames: np.ndarray, world: World, patch: tuple[int, int] | None
) -> dict[str, Any]:
    """Return what a video should show, what it shows, and which attributes are right.

    Args:
        patch: height and width of the model's patches in pixels, if known.
    """
    verdict = check(frames, world)
    kept = {"kept": row["conditioning_error"] <= KEPT_LEVELS} if "conditioning_error" in row else {}
    return {
        **row,
        "source": source,
        "seen": asdict(verdict),
        "right": compare(verdict, row) | kept,
        "noise": background_noise(frames),
        "borders": patch_borders(frames, *patch) if patch else None,
    }


def summarise(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return, per set, the number of videos, how often each key of `checker.compare` is right, and `MEASURES`.

    That is the share of the videos that have the key; a measure is the mean of the videos that have it.
    """
    summary: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(result["set"] for result in results):
        own = [result for result in results if result["set"] == name]
        keys = dict.fromkeys(key for result in own for key in result["right"])
        summary[name] = {"n": len(own)}
        for key in keys:
            rights = [result["right"][key] for result in own if key in result["right"]]
            summary[name][key] = sum(rights) / len(rights)
        for key in MEASURES:
            if values := [result[key] for result in own if result[key] is not None]:
                summary[name][key] = sum(values) / len(values)
    return summary


def print_table(summary: dict[str, dict[str, float]]) -> None:
    """Print the shares in percent and the measures, one line per set."""
    keys = list(dict.fromkeys(key for row in summary.values() for key in row if key != "n"))
    keys.sort(key=lambda key: key in MEASURES)  # to the right
    widths = {key: max(8, len(key)) for key in keys}
    print(f"{'set':<20} {'n':>4}" + "".join(f" {key:>{width}}" for key, width in widths.items()))
    for name, row in summary.items():
        cells = (f"{row[key]:{MEASURES.get(key, '.1%')}}" if key in row else "" for key in keys)
        line = "".join(f" {cell:>{width}}" for cell, width in zip(cells, widths.values(), strict=True))
        print(f"{name:<20} {row['n']:>4}{line}".rstrip())


def parse_args() -> argparse.Namespace:
    """Read the flags. Raises UserError for a value out of range, and for a flag without an effect."""
    parser = script_parser(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--videos", type=Path, metavar="DIR", help="output folder of sample.py")
    source.add_argument(
        "--checkpoint",
        type=Path,
        metavar="RUN",
        help="run, checkpoint or pipeline folder; default: the model that comes with stdit",
    )
    source.add_argument("--codec", type=Path, metavar="DIR", help="folder of a codec")
    parser.add_argument(
        "--prompts", type=Path, nargs="+", metavar="CSV", help="prompt files; default: see above"
    )
    parser.add_argument("--output", type=Path, metavar="JSON", help="file for scores and all verdicts")
    parser.add_argument(
        "--patch",
        type=int,
        metavar="PIXELS",
        help="with --videos: side of the model's patches, for the borders",
    )
    parser.add_argument("--seed", type=int, help=f"of the first prompt ({DEFAULTS['seed']})")
    parser.add_argument("--num_frames", type=int, help="default: that of the prompts' world (16 or 25)")
    parser.add_argument(
        "--size", type=int, help="height and width in pixels; default: the world's (32 or 64)"
    )
    parser.add_argument(
        "--conditioning", nargs="+", choices=["first", "last"], help="condition on frames of a clip"
    )
    parser.add_argument(
        "--conditioning_frames",
        type=int,
        help=f"at each end; default: {LEAST_CONDITIONING_FRAMES}, or as many more as fill whole latent frames",
    )
    for name, kind in SAMPLING.items():
        parser.add_argument(f"--{name}", type=kind, help="default: the pipeline's")
    parser.add_argument("--batch_size", type=int, help=f"prompts per batch ({DEFAULTS['batch_size']})")
    parser.add_argument("--device", help=f"auto: a GPU if there is one ({DEFAULTS['device']})")
    add_import(parser, "a module of yours that the checkpoint needs; repeatable")
    args = parser.parse_args()
    import_modules(args.imports)
    for name, value in LEAST.items():
        if getattr(args, name) is not None and getattr(args, name) < value:
            raise UserError(f"{name} = {getattr(args, name)}: must be at least {value}")
    VideoSettings(**{name: getattr(args, name) for name in SAMPLING}).check()
    check_seed(args.seed or 0)
    for scored, unused in UNUSED.items():
        if getattr(args, scored) and (given := [name for name in unused if getattr(args, name) is not None]):
            raise UserError(f"--{given[0]} has no effect with --{scored}: leave it out")
    if args.conditioning_frames is not None and not args.conditioning:
        raise UserError(
            "--conditioning_frames has no effect without --conditioning first, last or both: add it"
        )
    if args.patch is not None and (args.patch < 2 or not args.videos):
        raise UserError(
            f"patch = {args.patch}: must be at least 2 pixels, and is for --videos: a checkpoint says it itself"
        )
    if args.output:
        check_output_file(args.output, "scores.json")
    args.changed = {name: value for name in CHANGES if (value := getattr(args, name)) is not None}
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.conditioning = list(dict.fromkeys(args.conditioning or []))
    return args


def check_sampling(args: argparse.Namespace, recorded: Mapping[str, Any]) -> None:
    """Warn of a size that a model was not trained on. Raises UserError for settings without an effect on it."""
    recorded = {**PIPELINE_DEFAULTS, **recorded}
    given = VideoSettings(**{name: getattr(args, name) for name in SAMPLING})
    given.check_used(given.resolved(recorded))
    warn_of_sizes([Request("", 0, VideoSettings(**sampling_settings(args)))], recorded)
    conditioned = (args.conditioning_frames or LEAST_CONDITIONING_FRAMES) * len(args.conditioning)
    if conditioned >= args.num_frames:
        raise UserError(
            f"num_frames = {args.num_frames}: must be larger than the {conditioned} conditioning frames, so that "
            "some are left to generate"
        )


def main() -> None:
    args = parse_args()
    source, recorded = None, {}
    if not (args.videos or args.codec):
        source = find_checkpoint_source(args.checkpoint)
        recorded = pipeline_settings(source)
    world, expected = (
        read_expected(args.prompts)
        if args.prompts
        else default_prompts(bool(args.videos), recorded.get("height", 0))
    )
    args.num_frames, args.size = args.num_frames or world.num_frames, args.size or world.size
    weights, patch = None, None
    if source is not None:
        check_sampling(args, recorded)
        pipe, weights, patch = load(source, args.device)
        warn_of_conditioning(bool(args.conditioning), pipe.scheduler.config.conditioning)
        videos = sample_videos(pipe, args, expected, world)
    elif args.codec:
        videos = code_videos(args.codec, args, expected, world)
    else:
        patch = None if args.patch is None else (args.patch, args.patch)
        videos = read_videos(args.videos, expected)
    results = [judge(*video, world, patch) for video in videos]
    scores = summarise(results)
    print_table(scores)
    if args.output:
        with created_folder(args.output.absolute().parent):
            write_json_atomic(
                args.output,
                {
                    "scores": scores,
                    "weights": weights,
                    "changed_settings": args.changed,
                    "seed": args.seed,
                    "videos": results,
                },
            )


if __name__ == "__main__":
    run(main)
