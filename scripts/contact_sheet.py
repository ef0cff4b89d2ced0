"""Show how validation videos change during training: one row per prompt, one column per step, as one PNG.

    python scripts/contact_sheet.py outputs/quickstart
    python scripts/contact_sheet.py outputs/quickstart --columns 12 --frames 3 --output steps.png

RUN is the folder of a run with validation videos (validation.prompts, validation.every), finished or not. The sheet
is samples/steps.png in it, unless --output says otherwise; an older sheet is replaced.
"""

from pathlib import Path

from stdit.cli import run, script_parser
from stdit.errors import UserError
from stdit.training.step_sheet import write_step_sheet


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run, such as outputs/quickstart")
    parser.add_argument("--output", type=Path, metavar="PNG", help="default: RUN/samples/steps.png")
    parser.add_argument("--columns", type=int, default=8, help="most steps, spread evenly (%(default)s)")
    parser.add_argument(
        "--frames", type=int, default=1, help="of each video; 1: the middle one (%(default)s)"
    )
    args = parser.parse_args()
    for name in ("columns", "frames"):
        if not 1 <= getattr(args, name) <= 100:
            raise UserError(f"--{name} {getattr(args, name)}: must be from 1 to 100.")
    print(write_step_sheet(args.run, args.output, args.columns, args.frames))


if __name__ == "__main__":
    run(main)
