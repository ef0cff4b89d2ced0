"""Captions of the embedded data set, and which words are held out."""

import re
from itertools import combinations

import numpy as np

from stdit.data.shapes.captions import (
    PAIR_TEMPLATES,
    SEEN,
    TEMPLATES,
    UNSEEN,
    UNSEEN_PAIR_TEMPLATES,
    UNSEEN_TEMPLATES,
    caption,
    paraphrase,
)
from stdit.data.shapes.scenes import Scene
from stdit.data.shapes.worlds import WORLDS
from tests.data.shapes.clips import BASE, LARGE, scenes, unseen_names, words

PAIR = Scene(
    "star", "orange", "", "dark to light", relation="orbits", other_shape="heart", other_colour="pink"
)

NEW = {world.new for world in WORLDS.values() if world.new}


def test_captions_are_deterministic_and_vary() -> None:
    for scene in (BASE, PAIR):
        texts = [caption(scene, np.random.default_rng(i)) for i in range(200)]
        assert texts == [caption(scene, np.random.default_rng(i)) for i in range(200)]
        assert len(set(texts)) > 195
        assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]|[{}|]|  ", text) for text in texts)


def test_every_value_has_many_words() -> None:
    for name, options in SEEN.items():
        least = 12 if name != "relation" else 11
        options = {value: wordings for value, wordings in options.items() if value not in NEW}
        assert all(len(set(wordings)) >= least for wordings in options.values())
        known = getattr(LARGE, name + "s")
        assert list(options) == list(known) or name == "motion" and set(options) == set(known)
    for options in UNSEEN.values():
        assert all(len(set(wordings)) >= 2 for wordings in options.values())
    assert {"shape", "colour", "motion"} <= set(UNSEEN)
    for seen, unseen in ((TEMPLATES, UNSEEN_TEMPLATES), (PAIR_TEMPLATES, UNSEEN_PAIR_TEMPLATES)):
        assert len(seen) >= 20 and not set(seen) & set(unseen)


def test_the_names_of_a_new_value_share_a_word_of_its_own() -> None:
    for options in SEEN.values():
        for new in NEW & set(options):
            (shared,) = set.intersection(*map(words, options[new]))
            others = (phrase for value, phrases in options.items() if value != new for phrase in phrases)
            assert not any(shared in words(phrase) for phrase in others)


def test_no_phrase_names_two_values() -> None:
    for lists in (SEEN, UNSEEN):
        for options in lists.values():
            for one, other in combinations(options.values(), 2):
                assert not set(one) & set(other)


def test_unseen_words_never_occur_in_training_captions() -> None:
    phrases = [phrase for options in SEEN.values() for values in options.values() for phrase in values]
    trained = set().union(
        *map(words, phrases), *(words(re.sub(r"{.}", "", text)) for text in TEMPLATES + PAIR_TEMPLATES)
    )
    for options in UNSEEN.values():
        for phrase in (phrase for values in options.values() for phrase in values):
            assert not words(phrase) & trained, phrase
    # The lists above are all that captions are made of:
    rng = np.random.default_rng(0)
    for scene in scenes(500) + scenes(500, world=LARGE) + scenes(500, world=LARGE, pairs=True):
        spoken = words(caption(scene, rng)) - {"an"}
        assert spoken <= trained


def test_paraphrases_use_unseen_words() -> None:
    rng = np.random.default_rng(0)
    some = [unseen_names(paraphrase(scene, rng), scene) for scene in scenes(300)]
    assert all(some) and {len(names) for names in some} == {1, 2, 3}
    for scene in scenes(300):
        text = paraphrase(scene, rng, strict=True)
        assert unseen_names(text, scene) == {"shape", "colour", "motion"}, text


def test_paraphrases_of_world_64_use_unseen_words() -> None:
    rng = np.random.default_rng(0)
    for pairs, name in ((False, "motion"), (True, "relation")):
        shown = scenes(200, world=LARGE, pairs=pairs)
        some = [unseen_names(paraphrase(scene, rng), scene) for scene in shown]
        assert all(names <= {"shape", "colour", name} for names in some) and {name} in some
        for scene in shown:
            assert unseen_names(paraphrase(scene, rng, strict=True), scene) == {"shape", "colour", name}


def test_a_caption_of_two_objects_names_both_in_order() -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(300, world=LARGE, pairs=True):
        text = caption(scene, rng)
        places = [
            min((text.find(word) for word in SEEN["colour"][colour] if word in text), default=-1)
            for colour in (scene.colour, scene.other_colour)
        ]
        assert -1 not in places, (text, scene)
