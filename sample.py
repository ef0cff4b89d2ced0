"""Generate videos from prompts.

    python sample.py --prompt "a red star moves to the right"    # runs on a CPU
    python sample.py --help                                      # more examples, and every setting

An installed wheel has the same command as stdit-sample.
"""

from stdit.commands.sample import main, sample_command

__all__ = ["main"]

if __name__ == "__main__":
    sample_command()
