"""Build the embedded data set "shapes": small videos of moving shapes, captions, and prompts to evaluate with.

    python scripts/make_shapes.py --output data/shapes
    python scripts/make_shapes.py --output data/shapes --num_clips 500 --seed 1

A second run with the same settings reuses the files; one with other settings replaces them, and says so. Nothing else
in the folder is touched.
"""

from pathlib import Path

from stdit.cli import run, script_parser
from stdit.data.shapes.build import ShapesConfig, build


def main() -> None:
    parser = script_parser(__doc__)
    defaults = ShapesConfig()
    parser.add_argument("--output", type=Path, default=Path("data/shapes"), help="folder (%(default)s)")
    parser.add_argument("--num_clips", type=int, default=defaults.num_clips, help="videos (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="(%(default)s)")
    parser.add_argument("--size", type=int, default=defaults.size, help="side in pixels (%(default)s)")
    parser.add_argument(
        "--num_frames", type=int, default=defaults.num_frames, help="frames per clip (%(default)s)"
    )
    parser.add_argument("--fps", type=int, default=defaults.fps, help="frames per second (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    args = parser.parse_args()
    config = ShapesConfig(args.num_clips, args.seed, args.num_frames, args.fps, args.size)
    done = build(args.output, config, args.workers)
    print(f"{args.output}: {config.num_clips} clips {done or 'exist already'}")


if __name__ == "__main__":
    run(main)
