"""Prompt files that say what a video should show, for scripts/evaluate_adherence.py, and clips rendered from them.

Letters: T frames, H height, W width.
"""

import csv
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from stdit.data.shapes.outlines import Array
from stdit.data.shapes.render import render
from stdit.data.shapes.scenes import Combo
from stdit.data.shapes.worlds import WORLDS, World, sample_scene, split_combinations
from stdit.errors import UserError

Expected = dict[str, Any]
"""A prompt: its text, its attributes, and the name of its set."""


def read_expected(files: list[Path], world: World | None = None) -> tuple[World, list[Expected]]:
    """Read the prompts of all files; each file is a set, named like it without "prompts_".

    Args:
        world: the world that they belong to; None: the one that their columns and values tell.

    Returns:
        The world, and the prompts.

    Raises:
        UserError: for files that cannot be read, of two worlds, or of one name; and for what no clip can show.
    """
    names = {path: path.stem.removeprefix("prompts_") for path in files}
    for first, second in combinations(files, 2):
        if names[first] == names[second]:
            raise UserError(
                f"{first} and {second} are two sets of one name: give only one of them, or rename it"
            )
    sets = {path: _read_rows(path) for path in files}
    worlds = {path: _world(path, rows, world) for path, rows in sets.items()}
    world = worlds[files[0]]
    if other := next((path for path in files if worlds[path] is not world), None):
        raise UserError(
            f"{files[0]} is of world {world.name} and {other} of world {worlds[other].name}: score them one by one, "
            "or name one world that has both"
        )
    expected = []
    for path, rows in sets.items():
        for row in rows:
            wanted = {column: row[column] for column in ("prompt", *world.attributes)}
            odd = next((c for c, values in world.attributes.items() if wanted[c] not in values), None)
            if odd:
                values = ", ".join(value for value in world.attributes[odd] if value)
                raise UserError(f"{path}: {odd} = {wanted[odd]}: must be one of {values}")
            if world.relations:
                _check_objects(path, wanted)
            if _combo(wanted) not in _combinations(world):
                why = f"a {wanted['shape']} does not show that it turns"
                if wanted.get("relation"):
                    why = f"other_colour = {wanted['other_colour']}: must be another than colour"
                raise UserError(f"{path}: {wanted['prompt']!r} is what no clip shows: {why}")
            expected.append({"set": names[path], **wanted})
    return world, expected


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; scripts/make_shapes.py writes such files") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV in UTF-8 ({error}): save it as one") from error


def _world(path: Path, rows: list[dict[str, str]], asked: World | None) -> World:
    """Return the world with most of the columns of a file, and of several the first that has its values.

    Raises:
        UserError: if there is none.
    """
    candidates = [asked] if asked else WORLDS.values()
    found = [
        world
        for world in candidates
        if rows and all(row.get(name) is not None for row in rows for name in world.attributes)
    ]
    if not found or any(not row.get("prompt") for row in rows):
        columns = ",".join(["prompt", *WORLDS["32"].attributes])
        more = ",".join(name for name in WORLDS["64"].attributes if name not in WORLDS["32"].attributes)
        raise UserError(
            f"{path} must be a CSV with rows, and with the columns {columns} (world 64: and {more})"
        )
    most = max(len(world.attributes) for world in found)
    found = [world for world in found if len(world.attributes) == most]
    fitting = (
        world
        for world in found
        if all(row[name] in values for row in rows for name, values in world.attributes.items())
    )
    return next(fitting, found[0])


def _check_objects(path: Path, row: dict[str, str]) -> None:
    """Raise UserError unless a prompt has one object with a motion, or two with a relation."""
    two = [bool(row[name]) for name in ("relation", "other_shape", "other_colour")]
    if bool(row["motion"]) in two or not (row["shape"] and row["colour"] and row["background"]):
        raise UserError(
            f"{path}: {row['prompt']!r} must have a motion, or relation, other_shape and other_colour, and not both"
        )


def _combo(row: Expected) -> Combo:
    """Return the combination of a prompt's objects: of one with a motion, or of two."""
    two = ("relation", "other_shape", "other_colour") if row.get("relation") else ("motion",)
    return tuple(row[name] for name in ("shape", "colour", *two))


@cache
def _combinations(world: World) -> frozenset[Combo]:
    """Return all combinations that clips of a world show."""
    kinds = (False, True) if world.relations else (False,)
    whole = replace(world, new="")
    parts = [part for pairs in kinds for part in split_combinations(world=whole, pairs=pairs)]
    return frozenset(combo for part in parts for combo in part)


def render_prompt(row: Expected, seed: int, world: World, num_frames: int, size: int) -> Array:
    """Render a clip that a prompt describes: uint8 [T H W 3], of square frames."""
    scene = sample_scene(np.random.default_rng(seed), [_combo(row)], world)
    scene = replace(scene, background=row["background"])
    return render(scene, num_frames, size)
