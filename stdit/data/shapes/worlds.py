"""The worlds of the embedded data set: what their clips may show, the draw of scenes, and the held-out combinations.

32       one shape on a plain background, 32x32 pixels: small enough for the quickstart
64       more shapes, colours, motions and backgrounds, and two shapes with a relation; 64x64 pixels
ring       world 32 and a new shape, which all clips show: to teach it to a model of world 32
diagonal   world 32 and a new motion, likewise
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from stdit.data.shapes.outlines import REACH, SYMMETRY, Array
from stdit.data.shapes.render import BACKGROUNDS, COLOURS, PLAIN
from stdit.data.shapes.scenes import DIRECTIONS, FRAME, MOTIONS, RELATIONS, SCALES, Combo, Scene, bodies

PAIR_SHARE = 1 / 3
"""Share of clips with two objects, in a world that has relations."""
MARGIN = 0.3
"""Pixels of a 32x32 frame between an object and the border, where objects stay inside."""


@dataclass(frozen=True)
class World:
    """What the clips of a world may show. Lengths are pixels of a 32x32 frame."""

    name: str
    size: int
    """Default height and width of its clips in pixels; smaller ones would show too little of the shapes."""
    num_frames: int
    fps: int
    num_clips: int
    """Default number of clips of a data set."""
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    motions: tuple[str, ...]
    backgrounds: tuple[str, ...]
    relations: tuple[str, ...] = ()
    travel: float = 8.0
    radius: float = 6.0
    pair_radius: float = 0.0
    """Of each of two objects."""
    spread: float = 0.13
    """Travel and radius vary by this fraction around their mean."""
    start_range: float = 5.0
    """The start lies within this distance of the centre on either axis; with `inside`, of the middle of all places
    from which the objects stay inside the frame, and nowhere else."""
    inside: bool = False
    new: str = ""
    """A value that all clips show: the world is that of a model which learns it."""
    num_captions: int = 1
    """Of each clip: rows of the manifest with the same video."""

    @property
    def attributes(self) -> dict[str, tuple[str, ...]]:
        """The columns that describe a clip, with their values: empty if they do not apply to its objects."""
        one = {
            "shape": self.shapes,
            "colour": self.colours,
            "motion": self.motions,
            "background": self.backgrounds,
        }
        if not self.relations:
            return one
        two = {"relation": self.relations, "other_shape": self.shapes, "other_colour": self.colours}
        return one | {"motion": (*self.motions, "")} | {name: (*values, "") for name, values in two.items()}


WORLDS = {
    "32": World(
        name="32",
        size=32,
        num_frames=16,
        fps=8,
        num_clips=10_000,
        shapes=("circle", "square", "triangle", "cross"),
        colours=("red", "orange", "yellow", "green", "blue", "purple"),
        motions=(*DIRECTIONS, *SCALES),
        backgrounds=tuple(PLAIN),
    ),
    "64": World(
        name="64",
        size=64,
        num_frames=25,
        fps=12,
        num_clips=40_000,
        shapes=("circle", *SYMMETRY),
        colours=tuple(COLOURS),
        motions=MOTIONS,
        backgrounds=BACKGROUNDS,
        relations=tuple(RELATIONS),
        travel=9.5,
        pair_radius=3.5,
        spread=0.08,
        start_range=4.0,
        inside=True,
    ),
}
FEW_CLIPS: dict[str, Any] = {"num_clips": 60, "spread": 0.06, "start_range": 1.5, "num_captions": 16}
"""Few clips teach a value at nearly one place and in one size; and many captions, with which words it goes."""
WORLDS["ring"] = replace(
    WORLDS["32"],
    name="ring",
    shapes=(*WORLDS["32"].shapes, "ring"),
    travel=7.0,
    radius=8.6,  # a hole that is as wide as a latent of the codec "tiny"
    **FEW_CLIPS,
    new="ring",
)
WORLDS["diagonal"] = replace(
    WORLDS["32"],
    name="diagonal",
    motions=(*WORLDS["32"].motions, "diagonal"),
    **FEW_CLIPS,
    new="diagonal",
)


def make_scene(combo: Combo, background: str) -> Scene:
    """Return the scene of a combination: of one object or of two."""
    if len(combo) == 3:
        shape, colour, motion = combo
        return Scene(shape, colour, motion, background)
    shape, colour, relation, other_shape, other_colour = combo
    one = Scene(shape, colour, "", background)
    return replace(one, relation=relation, other_shape=other_shape, other_colour=other_colour)


def sample_scene(rng: np.random.Generator, combos: Sequence[Combo], world: World = WORLDS["32"]) -> Scene:
    """Sample a scene: one of `combos`, any background, and place, travel and radius in their full ranges."""
    combo = combos[int(rng.integers(len(combos)))]
    background = world.backgrounds[int(rng.integers(len(world.backgrounds)))]
    place = rng.uniform(-1, 1, 2)
    means = np.array([world.travel, world.radius if len(combo) == 3 else world.pair_radius])
    travel, radius = means * (1 + world.spread * rng.uniform(-1, 1, 2))
    scene = replace(make_scene(combo, background), travel=float(travel), radius=float(radius))
    if world.inside:
        scene = replace(scene, angle=90.0 * int(rng.integers(4)))  # one of four: varied, and quick to learn
        low, high = _inside(scene)
        x, y = (low + high) / 2 + np.minimum((high - low) / 2, world.start_range) * place
    else:
        x, y = FRAME / 2 + world.start_range * place
    return replace(scene, x=float(x), y=float(y))


def _inside(scene: Scene) -> tuple[Array, Array]:
    """Return the least and the largest start (x, y) with which all objects stay inside the frame."""
    frames = 100
    objects = bodies(replace(scene, x=0.0, y=0.0), frames)
    reach = [REACH * body.radius + MARGIN for body in objects]
    paths = [np.stack([body.x, body.y]) for body in objects]  # [2 T]
    low = np.max([(r - path).max(1) for path, r in zip(paths, reach, strict=True)], 0)
    high = np.min([(FRAME - r - path).min(1) for path, r in zip(paths, reach, strict=True)], 0)
    return low, high


@cache
def choose_evenly(
    combos: tuple[Combo, ...], backgrounds: tuple[str, ...], count: int, seed: int
) -> list[tuple[Combo, str]]:
    """Choose combinations of one object and backgrounds for few clips: every pair of values about equally often.

    One by one, each time that whose pairs were chosen least; those that are equal in an order drawn by the seed.
    """
    every = list(itertools.product(combos, backgrounds))
    every = [every[i] for i in np.random.default_rng([seed, 3]).permutation(len(every))]
    chosen: list[tuple[Combo, str]] = []
    times: Counter[tuple[Combo, str]] = Counter()
    used: Counter[tuple[str, ...]] = Counter()

    def pairs(combo: Combo, background: str) -> Iterable[tuple[str, ...]]:
        return itertools.combinations((*combo, background), 2)

    for _ in range(count):
        least = min(every, key=lambda one: (times[one], sum(used[pair] ** 2 for pair in pairs(*one))))
        chosen.append(least)
        times[least] += 1
        used.update(pairs(*least))
    return chosen


@cache
def split_combinations(
    seed: int = 0, world: World = WORLDS["32"], pairs: bool = False
) -> tuple[tuple[Combo, ...], tuple[Combo, ...]]:
    """Split the combinations of one object, or of two, into (training, held out), by seed.

    A Latin design holds out a quarter: every value has a number, in an order drawn by the seed, and the numbers of a
    combination that is held out add up to a multiple of four. Every pair of values of two attributes still occurs in
    training; with a new value, which all combinations have, every other value.
    """
    rng = np.random.default_rng([seed, 1])
    shapes, colours, motions, relations = (
        {str(name): i for i, name in enumerate(rng.permutation(list(names)))}
        for names in (world.shapes, world.colours, world.motions, world.relations)
    )
    combos: list[tuple[int, Combo]]
    if pairs:
        combos = [
            (shapes[s] - colours[c] - relations[r] + shapes[t] - colours[d], (s, c, r, t, d))
            for s in world.shapes
            for c in world.colours
            for r in world.relations
            for t in world.shapes
            for d in world.colours
            if c != d
        ]
    else:
        combos = [
            (shapes[s] - colours[c] - motions[m], (s, c, m))
            for s in world.shapes
            for c in world.colours
            for m in world.motions
            if m != "turn" or s in SYMMETRY
        ]
    if world.new:
        combos = [(n, combo) for n, combo in combos if world.new in combo]
    return tuple(c for n, c in combos if n % 4), tuple(c for n, c in combos if n % 4 == 0)
