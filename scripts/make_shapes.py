"""Build the embedded data set "shapes": small videos of moving shapes, captions, and prompts to evaluate with.

    python scripts/make_shapes.py --output data/shapes
    python scripts/make_shapes.py --output data/shapes --num_clips 500 --seed 1
    python scripts/make_shapes.py --output data/shapes64 --world 64
    python scripts/make_shapes.py --output data/ring --world ring

--world 64 has more shapes, colours, motions and backgrounds, and pairs of shapes with a relation, at 64x64 pixels.
--world ring and --world diagonal are 60 clips that all show a new shape, or a new motion, to teach it to a model of
world 32 (stdit/lora/README.md). The values of all worlds are in stdit/data/shapes/worlds.py.

A second run with the same settings reuses the files; one with other settings replaces them, and says so. Nothing else
in the folder is touched.
"""

from pathlib import Path

from stdit.cli import run, script_parser
from stdit.data.shapes.build import ShapesConfig, build
from stdit.data.shapes.worlds import WORLDS


def _each(setting: str) -> str:
    return ", ".join(f"world {name}: {getattr(world, setting)}" for name, world in WORLDS.items())


def main() -> None:
    parser = script_parser(__doc__)
    defaults = ShapesConfig()
    parser.add_argument("--output", type=Path, default=Path("data/shapes"), help="folder (%(default)s)")
    parser.add_argument("--num_clips", type=int, help=f"videos ({_each('num_clips')})")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="(%(default)s)")
    parser.add_argument("--world", choices=list(WORLDS), default=defaults.world, help="(%(default)s)")
    parser.add_argument("--size", type=int, help=f"side in pixels ({_each('size')})")
    parser.add_argument("--num_frames", type=int, help=f"frames per clip ({_each('num_frames')})")
    parser.add_argument("--fps", type=int, help=f"frames per second ({_each('fps')})")
    parser.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    args = parser.parse_args()
    config = ShapesConfig.of(
        args.world,
        num_clips=args.num_clips,
        seed=args.seed,
        size=args.size,
        num_frames=args.num_frames,
        fps=args.fps,
    )
    done = build(args.output, config, args.workers)
    print(f"{args.output}: {config.num_clips} clips {done or 'exist already'}")


if __name__ == "__main__":
    run(main)
