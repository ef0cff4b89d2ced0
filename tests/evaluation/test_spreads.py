"""How much positions and sizes of objects differ from video to video."""

from dataclasses import asdict

import numpy as np
import pytest

from stdit.data.shapes.checker import check
from stdit.data.shapes.prompt_files import render_prompt
from stdit.data.shapes.worlds import WORLDS
from stdit.evaluation.scores import mean_scores, spreads

PROMPT = {"shape": "circle", "colour": "red", "motion": "right", "background": "black"}


def result(motion: str, place: tuple[float, float, float] | None) -> dict:
    return {
        "set": "a",
        "motion": motion,
        "seen": {"place": place},
        "right": {},
        "noise": None,
        "borders": None,
    }


def test_videos_of_one_motion_are_compared() -> None:
    results = [
        *(result("left", (x, 10.0, 8.0)) for x in (9.0, 11.0)),
        *(result("right", (20.0, y, y)) for y in (3.0, 5.0)),
        result("grow", (0.0, 0.0, 99.0)),  # alone
        result("left", None),
    ]
    found = spreads(results)
    # Squares about the means of the motions: 2 along x, 2 along y, 2 of the size; two degrees of freedom.
    assert found == {"positions": pytest.approx(2**0.5), "sizes": pytest.approx(1.0)}
    assert mean_scores(results)["a"] == {"n": 6} | found
    assert spreads(results[-2:]) == {}


def test_a_place_is_that_of_the_object() -> None:
    places = [check(render_prompt(PROMPT, seed, WORLDS["32"], 16, 32)).place for seed in range(12)]
    assert all(place is not None for place in places)
    x, y, side = np.transpose(places)
    assert x.std() > 1 and y.std() > 1 and 4 < side.min() < side.max() < 20
    assert spreads([result("right", place) for place in places])["positions"] == pytest.approx(
        float(np.sqrt(x.var(ddof=1) + y.var(ddof=1)))
    )
    assert asdict(check(np.zeros((16, 32, 32, 3), np.uint8)))["place"] is None
