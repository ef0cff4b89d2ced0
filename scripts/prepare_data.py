"""Prepare a folder of videos for training, in steps.

    python scripts/prepare_data.py probe clips clips/probed.csv
    python scripts/prepare_data.py --help  # all steps, with examples

An installed wheel has the same command as stdit-prepare.
"""

from stdit.commands.prepare import COMMANDS, main, prepare_command
from stdit.commands.prepare_flags import build_parser

__all__ = ["COMMANDS", "build_parser", "main"]

if __name__ == "__main__":
    prepare_command()
