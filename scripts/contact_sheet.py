"""Show how validation videos change during training, or contact sheets side by side, as one PNG.

    python scripts/contact_sheet.py outputs/quickstart
    python scripts/contact_sheet.py outputs/quickstart --columns 12 --frames 3 --output steps.png
    python scripts/contact_sheet.py outputs/bundled/videos outputs/quickstart/videos --output sheets.png

One path is the folder of a run with validation videos (validation.prompts, validation.every), finished or not. The
sheet has a row per prompt and a column per step, and is samples/steps.png in it, unless --output says otherwise.
Several paths are output folders of sample.py, or sheets, which are put side by side. An older sheet is replaced.
"""

from pathlib import Path

from stdit.cli import run, script_parser
from stdit.errors import UserError
from stdit.pipelines.joined_sheet import write_joined_sheet
from stdit.training.step_sheet import write_step_sheet


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        type=Path,
        help="folder of a run, such as outputs/quickstart; or several folders with a sheet.png",
    )
    parser.add_argument(
        "--output", type=Path, metavar="PNG", help="default, for a run: samples/steps.png in its folder"
    )
    parser.add_argument("--columns", type=int, help="of a run: most steps, spread evenly (8)")
    parser.add_argument("--frames", type=int, help="of a run: frames of each video; 1: the middle one (1)")
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in ("columns", "frames") if getattr(args, name) is not None}
    for name, value in given.items():
        if not 1 <= value <= 100:
            raise UserError(f"--{name} {value}: must be from 1 to 100.")
    if len(args.paths) == 1:
        print(write_step_sheet(args.paths[0], args.output, **given))
        return
    if given or args.output is None:
        raise UserError(
            f"{len(args.paths)} paths: their sheets are put side by side: add --output, and leave out --columns and "
            "--frames, which are for one run."
        )
    write_joined_sheet(args.paths, args.output)
    print(args.output)


if __name__ == "__main__":
    run(main)
