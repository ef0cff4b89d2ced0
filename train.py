"""Train a text-to-video ST-DiT.

    python train.py --config configs/train/quickstart.yaml  # runs on a CPU
    python train.py --help                                  # more examples, and every setting

An installed wheel has the same command as stdit-train.
"""

from stdit.commands.train import loop, main, train, train_command

__all__ = ["loop", "main", "train"]

if __name__ == "__main__":
    train_command()
