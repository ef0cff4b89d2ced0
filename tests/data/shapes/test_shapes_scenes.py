"""Scenes of the embedded data set: how they are drawn, rendered and split."""

from itertools import combinations

import numpy as np
import pytest

from stdit.data.shapes.outlines import REACH, SHAPES, coverage
from stdit.data.shapes.render import COLOURS, background_image, render
from stdit.data.shapes.scenes import RELATIONS, Scene, bodies
from stdit.data.shapes.worlds import WORLDS, World, split_combinations
from tests.data.shapes.clips import BASE, LARGE, ONES, SMALL, TWOS, scenes


def test_render_is_deterministic_and_follows_the_motion() -> None:
    scene = Scene("square", "blue", "right", "black", x=12, y=16, travel=8, radius=5)
    first, again = render(scene), render(scene)
    assert first.shape == (16, 32, 32, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    columns = np.arange(32) + 0.5
    blue = first[..., 2].astype(float).sum(1)  # [T W]
    centres = blue @ columns / blue.sum(1)
    assert centres[0] == pytest.approx(12, abs=0.1) and centres[-1] == pytest.approx(20, abs=0.1)
    assert tuple(first[0, 16, 12]) == COLOURS["blue"]


def test_render_is_anti_aliased_and_scales() -> None:
    small, large = render(BASE), render(BASE, size=64)
    partial = (small[..., 0] > 20) & (small[..., 0] < 200)
    assert partial.any()
    halved = large.astype(float).reshape(16, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(halved - small).mean() < 1.0


def test_scenes_vary_over_their_full_ranges() -> None:
    many = scenes(400)
    for name, low, high in (("x", 11, 21), ("y", 11, 21), ("travel", 6.96, 9.04), ("radius", 5.22, 6.78)):
        values = [getattr(scene, name) for scene in many]
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high >= max(values) > high - 0.05 * (high - low)
    assert {scene.background for scene in many} == set(SMALL.backgrounds)


def test_objects_of_world_64_stay_inside_and_apart() -> None:
    for scene in scenes(300, world=LARGE) + scenes(300, world=LARGE, pairs=True):
        objects = bodies(scene, LARGE.num_frames)
        for body in objects:
            reach = REACH * body.radius
            for place in (body.x, body.y):
                assert (place > reach).all() and (place < 32 - reach).all(), scene
        if len(objects) == 2:
            one, other = objects
            distance = np.hypot(one.x - other.x, one.y - other.y)
            assert (distance > REACH * (one.radius + other.radius)).all(), scene


def test_world_64_shows_every_value() -> None:
    ones, twos = scenes(800, world=LARGE), scenes(800, world=LARGE, pairs=True)
    for name in ("shape", "colour", "motion", "background"):
        assert {getattr(scene, name) for scene in ones} == set(getattr(LARGE, name + "s"))
    for name in ("shape", "colour"):
        assert {getattr(scene, "other_" + name) for scene in twos} == set(getattr(LARGE, name + "s"))
    assert {scene.relation for scene in twos} == set(LARGE.relations) == set(RELATIONS)
    assert all(scene.colour != scene.other_colour for scene in twos)
    assert not any((scene.shape, scene.motion) == ("circle", "turn") for scene in ones)
    assert (len(LARGE.shapes), len(LARGE.colours), len(LARGE.motions)) == (6, 8, 9)


def test_shapes_are_alike_in_area_and_differ_in_outline() -> None:
    centre, radius = np.full(1, 64.0), np.full(1, 40.0)
    drawn = {name: coverage(name, centre, centre, radius, 128, 128)[0] for name in SHAPES}
    areas = [image.sum() for image in drawn.values()]
    assert max(areas) < 1.6 * min(areas)
    place = np.arange(128) + 0.5
    for name, image in drawn.items():
        middle = (image.sum(0) @ place, image.sum(1) @ place) / image.sum()
        assert np.abs(middle - 64).max() < 0.02 * 40, name
        reach = np.hypot(*np.meshgrid(place - 64, place - 64))[image > 0.5].max()
        assert reach <= REACH * 40, name
    for one, other in combinations(drawn.values(), 2):
        assert np.minimum(one, other).sum() / np.maximum(one, other).sum() < 0.85


def test_hues_of_new_colours_are_far_from_all_others() -> None:
    hues = {}
    for name, (r, g, b) in COLOURS.items():
        hues[name] = np.degrees(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b))
    for one, other in combinations(hues, 2):
        gap = abs((hues[one] - hues[other] + 180) % 360 - 180)
        assert gap >= (27 if {"cyan", "pink"} & {one, other} else 20), (one, other)


def test_a_turning_shape_turns_clockwise() -> None:
    (body,) = bodies(Scene("heart", "red", "turn", "black"), 5)
    assert body.angle is not None and body.angle.tolist() == [0, 45, 90, 135, 180]
    quarter = coverage("heart", *(np.full(1, a) for a in (32.0, 32.0, 20.0)), 64, 64, np.full(1, 90.0))[0]
    upright = coverage("heart", *(np.full(1, a) for a in (32.0, 32.0, 20.0)), 64, 64)[0]
    assert np.abs(quarter - np.rot90(upright, -1)).max() < 0.01


def test_a_bouncing_shape_touches_the_same_floor_twice() -> None:
    (body,) = bodies(Scene("circle", "red", "bounce", "black", y=8, travel=10), 721)
    floor = body.y.max()
    contacts = np.flatnonzero(
        (body.y[1:-1] >= body.y[:-2]) & (body.y[1:-1] > body.y[2:]) & (body.y[1:-1] > floor - 0.1)
    )
    assert len(contacts) == 2 and floor == pytest.approx(8 + 12.5, abs=0.1)
    assert body.y[0] < body.y[contacts[0] : contacts[1]].min() < body.y[-1]


@pytest.mark.parametrize("size", [32, 48, 64, 96])
def test_backgrounds_are_grey_at_every_size(size: int) -> None:
    for name in LARGE.backgrounds:
        image = np.broadcast_to(background_image(name, size), (size, size, 3))
        assert np.ptp(image, axis=-1).max() == 0 and 0 <= image.min() <= image.max() <= 255
    stripes = background_image("vertical stripes", size)[0, :, 0]
    assert stripes[:: size // 8].tolist() == [125, 185] * 4


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize("seed", range(5))
def test_split_holds_out_a_quarter_and_keeps_all_pairs(seed: int, world: World) -> None:
    kinds = [(False, ONES[world.name])] + ([(True, TWOS)] if world.relations else [])
    for pairs, combos in kinds:
        train, held_out = split_combinations(seed, world, pairs)
        assert sorted(train + held_out) == sorted(combos)
        assert len(combos) / 4 * 0.98 - 1 <= len(held_out) <= len(combos) / 4 * 1.02 + 1
        for i, j in combinations(range(len(combos[0])), 2):
            if world.new not in combos[0] or world.new in (combos[0][i], combos[0][j]):
                assert {(c[i], c[j]) for c in train} == {(c[i], c[j]) for c in combos}
            assert {(c[i], c[j]) for c in held_out} == {(c[i], c[j]) for c in combos} or not pairs
        assert split_combinations(seed, world, pairs) == (train, held_out)


def test_split_depends_on_the_seed() -> None:
    assert split_combinations(0)[1] != split_combinations(1)[1]
