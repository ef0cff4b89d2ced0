"""Types of command line arguments that several scripts have."""

import argparse


def positive_int(text: str) -> int:
    """Read an integer of at least 1, for ``add_argument(type=...)``."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return int(text)
