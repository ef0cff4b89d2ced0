"""Make the model that comes with stdit out of a run, and replace the one in stdit/bundled.

    python scripts/bundle.py --checkpoint outputs/shapes64
    python scripts/evaluate_adherence.py --output outputs/shapes64/scores.json
    python scripts/bundle.py --scores outputs/shapes64/scores.json

The second command scores the model that the first one made; the third records these scores in it. The model has the
averaged weights of the run's newest checkpoint, its codec, and the text encoder, by name and fingerprint if a package
ships it; at most 12 MB in all. Matrices are stored in bf16 and computed with in fp32. origin.json records settings,
steps, hours of training, losses, the hash of the weights, the commit of the clone that this script runs in, and the
scores.
"""

from pathlib import Path

from stdit.cli import add_import, import_modules, run, script_parser
from stdit.pipelines.bundled import BUNDLED, origin_line
from stdit.pipelines.sources import find_checkpoint_source


def main() -> None:
    parser = script_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, metavar="RUN", help="a run, or one of its checkpoints")
    source.add_argument("--scores", type=Path, metavar="JSON", help="output of evaluate_adherence.py")
    parser.add_argument("--output", type=Path, default=BUNDLED, metavar="DIR", help="default: stdit/bundled")
    add_import(parser, "a module of yours that the checkpoint needs; repeatable")
    args = parser.parse_args()
    import_modules(args.imports)
    if args.checkpoint:
        find_checkpoint_source(args.checkpoint)  # before imports that take long
    from stdit.training import bundle  # after parsing, so that --help is quick

    if args.checkpoint:
        origin = bundle.write_bundle(args.checkpoint, args.output)
    else:
        origin = bundle.record_scores(args.scores, args.output)
    parts = bundle.folder_sizes(args.output)
    shown = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in sorted(parts.items()) if name != ".")
    print(f"{args.output}: {sum(parts.values()) / 1e6:.2f} MB ({shown})")
    print(f"weights {origin['weights']}, {origin_line(origin)}")


if __name__ == "__main__":
    run(main)
