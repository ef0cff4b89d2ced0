"""Worlds with a new value: their few clips, their prompts, and how the checker tells the value from the others."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from stdit.data.shapes.build import ShapesConfig, build, draw_clip, draw_prompt_sets
from stdit.data.shapes.checker import score
from stdit.data.shapes.prompt_files import read_expected
from stdit.data.shapes.render import render
from stdit.data.shapes.worlds import WORLDS, World, make_scene, sample_scene, split_combinations
from stdit.errors import UserError
from tests.data.shapes.clips import SMALL, counts, encoded, read, scenes

NEW = [world for world in WORLDS.values() if world.new]
new_worlds = pytest.mark.parametrize("world", NEW, ids=[world.name for world in NEW])


@new_worlds
@counts(10, 200)
def test_the_checker_knows_the_new_value(world: World, tmp_path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    combos = sum(split_combinations(0, world), ())
    shown = [sample_scene(rng, combos, world) for _ in range(count)]
    strict = 0
    for scene in shown:
        assert score(render(scene), scene.attributes, world)["strict"], scene
        frames = encoded(render(scene), tmp_path / "clip.mp4")
        found = score(frames, scene.attributes, world)
        strict += found["strict"]
        assert found["lenient"], scene
        assert not score(frames, scene.attributes, SMALL)["lenient"], scene
    assert strict >= 0.9 * count  # on grey, 4:2:0 colours cost a few


@new_worlds
@counts(10, 300)
def test_the_checker_still_knows_the_others(world: World, count: int) -> None:
    for scene in scenes(count, seed=5):
        assert score(render(scene), scene.attributes, world)["strict"], scene


@new_worlds
def test_all_clips_show_it_and_prompts_ask_for_other_pairs(world: World) -> None:
    config = ShapesConfig.of(world.name)
    shown = {draw_clip(index, config)[0].combo for index in range(config.num_clips)}
    assert config.num_clips == 60 and all(world.new in combo for combo in shown)
    sets = draw_prompt_sets(config)
    assert set(sets) == {"heldout", "seen", "sample"} and len(sets["heldout"]) >= 18
    asked = {(row["shape"], row["colour"], row["motion"]) for row in sets["heldout"]}
    assert not shown & asked and all(world.new in combo for combo in asked)
    for colour in world.colours:
        assert any(colour in combo for combo in shown) and any(colour in combo for combo in asked)


@new_worlds
def test_its_few_clips_show_all_pairs_of_values_about_equally_often(world: World) -> None:
    config = ShapesConfig.of(world.name)
    shown = [draw_clip(index, config)[0].attributes for index in range(config.num_clips)]
    cells = itertools.product(split_combinations(config.seed, world)[0], world.backgrounds)
    every = [make_scene(*cell).attributes for cell in cells]
    for one, other in itertools.combinations(world.attributes, 2):
        pairs = Counter((scene[one], scene[other]) for scene in shown)
        possible = {(scene[one], scene[other]) for scene in every}
        assert set(pairs) == possible, (one, other)
        assert max(pairs.values()) - min(pairs.values()) <= 2, (one, other)


def test_prompt_files_tell_the_world_by_their_values(tmp_path: Path) -> None:
    header = "prompt,shape,colour,motion,background\n"
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    old.write_text(f"{header}a,circle,red,up,black\n")
    new.write_text(f"{header}a,ring,red,up,black\n")
    assert read_expected([old])[0] is SMALL and read_expected([new])[0] is WORLDS["ring"]
    with pytest.raises(UserError, match="one by one, or name one world that has both"):
        read_expected([old, new])
    world, expected = read_expected([old, new], WORLDS["ring"])
    assert world is WORLDS["ring"] and [row["shape"] for row in expected] == ["circle", "ring"]
    with pytest.raises(UserError, match="shape = ring: must be one of circle, square"):
        read_expected([new], SMALL)


def test_it_is_built_like_the_others(tmp_path: Path) -> None:
    build(tmp_path / "ring", ShapesConfig.of("ring", num_clips=2), workers=1)
    rows = read(tmp_path / "ring" / "manifest.csv")
    assert [row["shape"] for row in rows] == 32 * ["ring"] and len({row["text"] for row in rows}) == 32
    assert [row["path"] for row in rows] == 16 * ["videos/00000.mp4"] + 16 * ["videos/00001.mp4"]
    assert sorted(path.name for path in (tmp_path / "ring").glob("prompts*")) == [
        "prompts.txt",
        "prompts_heldout.csv",
        "prompts_sample.csv",
        "prompts_seen.csv",
    ]
