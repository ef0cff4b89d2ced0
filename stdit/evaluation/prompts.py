"""The prompts by which videos are scored if none are given. Imports no torch."""

from pathlib import Path

from stdit.data.shapes.build import ShapesConfig, draw_prompt_sets
from stdit.data.shapes.prompt_files import Expected, read_expected
from stdit.data.shapes.worlds import World

DATA = Path("data/shapes")
SETS = ("heldout", "paraphrase", "paraphrase_strict", "seen")
PAIR_SETS = ("relations", "relations_paraphrase")
"""Those of a world with relations."""


def default_prompts(videos: bool, size: int) -> tuple[World, list[Expected]]:
    """Return the world and the prompts that are scored: the files in `DATA`, or those of world 64, which are drawn.

    Args:
        videos: a folder of videos is scored, which may be of the prompts for samples.
        size: height of the videos in pixels, which tells the world.

    Raises:
        UserError: if the files cannot be read.
    """
    names = ("sample", *SETS) if videos else SETS
    config = ShapesConfig.of("64")
    if size == config.facts.size:
        sets = draw_prompt_sets(config)
        return config.facts, [{"set": name, **row} for name in (*names, *PAIR_SETS) for row in sets[name]]
    pairs = [path for name in PAIR_SETS if (path := DATA / f"prompts_{name}.csv").exists()]
    return read_expected([DATA / f"prompts_{name}.csv" for name in names] + pairs)
