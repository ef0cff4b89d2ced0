"""Score how well videos follow their prompts: shape, colour, motion and background, recognised from the pixels.

    python scripts/evaluate_adherence.py --videos outputs/quickstart/videos --patch 16
    python scripts/evaluate_adherence.py --checkpoint outputs/quickstart --output scores.json
    python scripts/evaluate_adherence.py --checkpoint outputs/quickstart --prompts my_prompts.csv
    python scripts/evaluate_adherence.py
    python scripts/evaluate_adherence.py --checkpoint outputs/i2v --conditioning first last
    python scripts/evaluate_adherence.py --codec outputs/tiny --prompts data/shapes64/prompts_heldout.csv
    python scripts/evaluate_adherence.py --checkpoint outputs/quickstart --lora outputs/ring/lora:0.8

--videos scores what sample.py wrote: every .mp4 with its prompt in the .json beside it. --checkpoint samples every
prompt of the prompt files itself, and scores what an .mp4 would show, too. --codec scores clips that are rendered
from the prompts, encoded and decoded: the best that a model with this codec can do. Without all three, the model that
comes with stdit is scored.

Without --prompts, the files of data/shapes are used; but for a model trained on 64x64 pixels, a folder whose first
video has this size, or a codec with --size 64, the prompts of world 64 (of data seed 0), which need no files.

Prompt files (columns prompt,shape,colour,motion,background) say what is expected.
Those of world 64 also have the columns relation,other_shape,other_colour, empty for one object; two have no motion.
Shapes and motions are told apart from those of the first world that has all values of a file. --world names another:
with --world ring, prompts of world 32 count as wrong if their object looks more like a ring.

The scores are, per prompt file, n (videos) and the share of them, from 0 to 1, in which each attribute is right.
"strict" and "lenient": all are right, shapes by the strict or the lenient rule of data/shapes/checker, and no object
is too many. "noise" is the mean noise of plain backgrounds, in levels of 255 (rms; real clips have about 1).
"borders" is how visible the borders of the model's patches are in plain backgrounds, on average: the mean absolute
difference of neighbouring pixels across borders, divided by that of other neighbours, both of at least one level (1:
not at all; real clips).
"positions" and "sizes" say how much videos of the same motion differ: the standard deviations of the mean centre and
side of single objects, in pixels of a frame of 32. A model that always makes the same video has 0.
A checkpoint says how large its patches are (codec stride times patch size); for --videos, --patch does.
With --conditioning, each video is conditioned on the first or last frames (or both) of a clip that is rendered from
its prompt, and "kept" is the share in which these frames come out unchanged: within 8 of 255 levels, on average.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stdit.atomic_files import write_json_atomic
from stdit.cli import add_import, import_modules, run, script_parser
from stdit.data.decoding.limits import MAX_DIMENSION
from stdit.data.shapes.prompt_files import read_expected
from stdit.data.shapes.worlds import WORLDS
from stdit.errors import UserError
from stdit.evaluation.prompts import default_prompts
from stdit.evaluation.scores import judge, mean_scores, print_table
from stdit.lora.config import LoRASpec, parse_lora
from stdit.parallel.processes.device import find_device
from stdit.pipelines.config import PIPELINE_DEFAULTS, VideoSettings, check_seed
from stdit.pipelines.loading import load_codec, load_pipeline, pipeline_settings
from stdit.pipelines.requests import Request
from stdit.pipelines.sources import CheckpointSource, find_checkpoint_source
from stdit.pipelines.untrained import warn_of_conditioning, warn_of_sizes
from stdit.pipelines.writer import check_output_file, created_folder


def word_or_number(text: str) -> str | float:
    """Read the value of a flag, for ``add_argument(type=...)``."""
    try:
        return float(text)
    except ValueError:
        return text


SAMPLING: dict[str, Callable[[str], Any]] = {
    "num_inference_steps": int,
    "solver": str,
    "cache": word_or_number,
    "guidance_scale": float,
    "shift": float,
    "refine_pairs": int,
    "refine_level": float,
    "refine_guidance_scale": float,
}
"""Settings of a pipeline call that are flags here."""
DEFAULTS = {"seed": 0, "batch_size": 16, "device": "auto"}
LIMITED = ("batch_size", "num_frames", "size", "conditioning_frames")
"""Flags that are numbers from 1 to `MAX_DIMENSION`."""
OF_A_MODEL = ("lora", "lora_other_base", "conditioning", "conditioning_frames", *SAMPLING)
CHANGES = ("num_frames", "size", *OF_A_MODEL)
"""Flags that change how a model's videos are made, and so its scores: the file of scores records them."""
UNUSED = {"codec": ("batch_size", *OF_A_MODEL), "videos": ("batch_size", *CHANGES, "seed", "device")}
"""Flags that have no effect on what another flag scores."""


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the pipeline's calls, by name."""
    given = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    return {"num_frames": args.num_frames, "height": args.size, "width": args.size, **given}


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
    parser.add_argument(
        "--world",
        choices=list(WORLDS),
        help="what videos may show, of the prompt files; default: the first world with their columns and values",
    )
    parser.add_argument(
        "--lora",
        action="append",
        metavar="FILE[:WEIGHT]",
        help="adapter for the checkpoint, as for sample.py; repeatable",
    )
    parser.add_argument(
        "--lora_other_base",
        action="store_true",
        default=None,
        help="use adapters that were trained on other weights",
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
        help="at each end; default: 4, or as many more as fill whole latent frames",
    )
    for name, kind in SAMPLING.items():
        parser.add_argument(f"--{name}", type=kind, help="default: the pipeline's")
    parser.add_argument("--batch_size", type=int, help=f"prompts per batch ({DEFAULTS['batch_size']})")
    parser.add_argument("--device", help=f"auto: a GPU if there is one ({DEFAULTS['device']})")
    add_import(parser, "a module of yours that the checkpoint needs; repeatable")
    args = parser.parse_args()
    import_modules(args.imports)
    for name in LIMITED:
        value = getattr(args, name)
        if value is not None and not 1 <= value <= MAX_DIMENSION:
            raise UserError(f"{name} = {value}: must be from 1 to {MAX_DIMENSION}")
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
    if args.world and not args.prompts:
        raise UserError("--world has no effect without --prompts: add them")
    args.loras = [parse_lora(text) for text in args.lora or ()]
    if args.output:
        check_output_file(args.output, "scores.json")
    args.changed = {name: value for name in CHANGES if (value := getattr(args, name)) is not None}
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


def check_sampling(args: argparse.Namespace, recorded: Mapping[str, Any]) -> None:
    """Warn of a size that a model was not trained on. Raises UserError for settings without an effect on it."""
    recorded = {**PIPELINE_DEFAULTS, **recorded}
    given = VideoSettings(**{name: getattr(args, name) for name in SAMPLING})
    given.check_used(given.resolved(recorded))
    given.check_saving(given.resolved(recorded))
    warn_of_sizes([Request("", 0, VideoSettings(**sampling_settings(args)))], recorded)


def height(args: argparse.Namespace, recorded: Mapping[str, Any]) -> int:
    """Return the height in pixels, of a folder's, codec's or model's videos, that tells which prompts to use."""
    if args.videos:
        from stdit.evaluation.folder import folder_height

        return folder_height(args.videos)
    return int(args.size or 0) if args.codec else int(recorded.get("height", 0))


def load(
    source: CheckpointSource, loras: Sequence[LoRASpec], device: str, any_base: bool = False
) -> tuple[Any, str, tuple[int, int]]:
    """Load the pipeline; return it, the hash of its weights, and height and width of its patches in pixels.

    Raises:
        UserError: as `load_pipeline`, or an adapter is of another architecture or base.
    """
    from stdit.pipelines.loras import use_loras

    on = find_device(device)
    pipe, weights = load_pipeline(source)
    use_loras(pipe, loras, any_base)
    pipe.to(on)
    pipe.set_progress_bar_config(disable=True)
    (_, *stride), (_, *tokens) = pipe.codec.stride, pipe.transformer.config.patch_size
    return pipe, weights, (stride[0] * tokens[0], stride[1] * tokens[1])


def main() -> None:
    args = parse_args()
    source = None if args.videos or args.codec else find_checkpoint_source(args.checkpoint)
    recorded = pipeline_settings(source) if source else {}
    world, expected = (
        read_expected(args.prompts, WORLDS.get(args.world))
        if args.prompts
        else default_prompts(bool(args.videos), height(args, recorded))
    )
    args.num_frames, args.size = args.num_frames or world.num_frames, args.size or world.size
    settings = sampling_settings(args)
    weights, patch = None, None
    if args.videos:
        from stdit.evaluation.folder import folder_videos

        patch = None if args.patch is None else (args.patch, args.patch)
        videos = folder_videos(args.videos, expected)
    elif source is None:
        from stdit.codecs.base import VideoCodec
        from stdit.evaluation.videos import coded_videos

        codec = VideoCodec.from_pretrained(args.codec).to(find_device(args.device))
        videos = coded_videos(codec, expected, world, seed=args.seed, settings=settings)
    else:
        from stdit.evaluation.videos import conditioned_frames, sampled_videos

        check_sampling(args, recorded)
        conditioned = args.conditioning and conditioned_frames(
            load_codec(source), args.num_frames, args.conditioning, args.conditioning_frames
        )
        pipe, weights, patch = load(source, args.loras, args.device, bool(args.lora_other_base))
        warn_of_conditioning(bool(conditioned), pipe.flow.config.conditioning)
        videos = sampled_videos(
            pipe,
            expected,
            world,
            seed=args.seed,
            batch_size=args.batch_size,
            settings=settings,
            conditioned=conditioned or (),
        )
    results = [judge(*video, world, patch) for video in videos]
    scores = mean_scores(results)
    print_table(scores)
    if args.output:
        written = {
            "scores": scores,
            "weights": weights,
            "changed_settings": args.changed,
            "seed": args.seed,
            "videos": results,
        }
        with created_folder(args.output.absolute().parent):
            write_json_atomic(args.output, written)


if __name__ == "__main__":
    run(main)
