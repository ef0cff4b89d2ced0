"""Captions of the embedded data set: many wordings for training, and paraphrases with held-out words.

A fixed random part of the synonyms of every value (`words.py`) is held out. A paraphrase uses held-out words for some
or all of shape, colour and motion (or relation), in a held-out sentence.
"""

import itertools

import numpy as np

from stdit.data.shapes.more_words import MORE_PLAIN_WORDS, MORE_SYNONYMS, MORE_THINGS
from stdit.data.shapes.scenes import Scene
from stdit.data.shapes.words import PLAIN_WORDS, SYNONYMS, THINGS, Words

HELD_OUT_SHARE = 0.2
"""Share of each pool of synonyms that is held out of training captions."""


def _combine(verbs: tuple[str, ...], places: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{verb} {place}" for verb in verbs for place in places)


def _hold_out(pool: Words, seed: int) -> tuple[Words, Words]:
    """Split every pool at random, by a fixed seed, into (kept, held out)."""
    rng = np.random.default_rng(seed)
    kept: Words = {}
    held: Words = {}
    for attribute, values in pool.items():
        for value, words in values.items():
            chosen = set(rng.permutation(len(words))[: max(2, round(HELD_OUT_SHARE * len(words)))].tolist())
            kept.setdefault(attribute, {})[value] = tuple(w for i, w in enumerate(words) if i not in chosen)
            held.setdefault(attribute, {})[value] = tuple(w for i, w in enumerate(words) if i in chosen)
    return kept, held


def _build() -> tuple[Words, Words]:
    """Return all wordings of training, and all that are held out."""
    seen, unseen = _hold_out(SYNONYMS, seed=0)
    verbs, unseen_verbs = seen["motion"].pop("move"), unseen["motion"].pop("move")
    motions, plain = seen["motion"], PLAIN_WORDS["motion"]
    for side in ("right", "left"):
        motions[side] = _combine(verbs, plain[side] + motions[side])
        unseen["motion"][side] = _combine(unseen_verbs, unseen["motion"][side])
    for way in ("up", "down"):
        motions[way] = _combine(verbs, plain[way]) + 10 * motions[way]  # as often the one form as the other
    for change in ("grow", "shrink"):
        motions[change] = plain[change] + motions[change]
    for attribute in ("shape", "colour"):
        for value, words in PLAIN_WORDS[attribute].items():
            seen[attribute][value] = words + THINGS[attribute][value] + seen[attribute][value]
    seen["background"] = dict(PLAIN_WORDS["background"])
    _add(seen, unseen)
    return seen, unseen


def _add(seen: Words, unseen: Words) -> None:
    """Add the words for the values that only world 64 has."""
    more_seen, more_unseen = _hold_out(MORE_SYNONYMS, seed=1)
    for attribute, values in MORE_PLAIN_WORDS.items():
        for value, words in values.items():
            things = MORE_THINGS.get(attribute, {}).get(value, ())
            kept = more_seen.get(attribute, {}).get(value, ())
            seen.setdefault(attribute, {})[value] = words + things + kept
    for attribute, values in more_unseen.items():
        unseen.setdefault(attribute, {}).update(values)


SEEN, UNSEEN = _build()

# c colour, s shape, m motion in the third person, p motion as a participle, b background.
TEMPLATES: tuple[str, ...] = (
    "a {c} {s} {m} on a {b} background",
    "a {c} {s} {p} on a {b} background",
    "the {c} {s} {m} against a {b} background",
    "a {c} {s} that {m} on a {b} background",
    "a {c} {s} {p} over a {b} backdrop",
    "one {c} {s} {m} in front of a {b} wall",
    "a video of a {c} {s} {p} on a {b} background",
    "a short clip of a {c} {s} that {m}, {b} background",
    "an animation of a {c} {s} {p} on a {b} screen",
    "video: {c} {s} {p}, {b} background",
    "footage of a {c} {s} {p} with a {b} background",
    "on a {b} background, a {c} {s} {m}",
    "against a {b} backdrop a {c} {s} is {p}",
    "there is a {c} {s} on a {b} background and it {m}",
    "{b} background, {c} {s}, {p}",
    "{c} {s}, {p}, {b} background",
    "{c} {s} {p} on {b}",
    "{p}: a {c} {s} on a {b} background",
    "a {s} that is {c} {m} on a {b} background",
    "a {s}, {c}, {p} across a {b} screen",
    "a {s} in {c} {m}, the background is {b}",
    "the background is {b}; a {c} {s} {m}",
    "a {b} scene where a {c} {s} {m}",
    "show me a {c} {s} {p} on a {b} background",
    "a {c} {s} is {p}, all on a {b} canvas",
    "in this video a {c} {s} {m} over a {b} surface",
    "a {s} {m}; it is {c} and the background is {b}",
    "a {c} {s} on a {b} background, {p}",
    "we see a {b} screen with a {c} {s} that {m}",
)
UNSEEN_TEMPLATES: tuple[str, ...] = (
    "here, a {c} {s} {m}, and all else is {b}",
    "look, some kind of {c} {s}, {p}; behind it all is {b}",
    "it is a {c} {s}, {p} before a {b} background",
    "all around is {b}, and in it a {c} {s} {m}",
    "you see how a {c} {s} {m}; everything else is {b}",
    "look at this {c} {s} {p}, with a {b} background behind it",
)

# The same for two objects: m and p are the relation, d and o colour and shape of the other object.
PAIR_TEMPLATES: tuple[str, ...] = (
    "a {c} {s} {m} a {d} {o} on a {b} background",
    "a {c} {s} {p} a {d} {o} on a {b} background",
    "the {c} {s} {m} the {d} {o} against a {b} background",
    "a {c} {s} that {m} a {d} {o} on a {b} background",
    "a {c} {s} {p} a {d} {o} over a {b} backdrop",
    "one {c} {s} {m} one {d} {o} in front of a {b} wall",
    "a video of a {c} {s} {p} a {d} {o} on a {b} background",
    "a short clip of a {c} {s} that {m} a {d} {o}, {b} background",
    "an animation of a {c} {s} {p} a {d} {o} on a {b} screen",
    "video: {c} {s} {p} {d} {o}, {b} background",
    "footage of a {c} {s} {p} a {d} {o} with a {b} background",
    "on a {b} background, a {c} {s} {m} a {d} {o}",
    "against a {b} backdrop a {c} {s} is {p} a {d} {o}",
    "{b} background, {c} {s} {p} {d} {o}",
    "{c} {s} {p} a {d} {o} on {b}",
    "a {c} {s} and a {d} {o} on a {b} background; the {c} {s} {m} the {d} {o}",
    "the background is {b}; a {c} {s} {m} a {d} {o}",
    "a {b} scene where a {c} {s} {m} a {d} {o}",
    "show me a {c} {s} {p} a {d} {o} on a {b} background",
    "in this video a {c} {s} {m} a {d} {o} over a {b} surface",
    "we see a {b} screen with a {c} {s} that {m} a {d} {o}",
    "two shapes on a {b} background: a {c} {s} is {p} a {d} {o}",
    "a {c} {s}, {p} a {d} {o}, all on a {b} canvas",
)
UNSEEN_PAIR_TEMPLATES: tuple[str, ...] = (
    "here, a {c} {s} {m} a {d} {o}, and all else is {b}",
    "look, some kind of {c} {s}, {p} a {d} {o}; behind it all is {b}",
    "all around is {b}, and in it a {c} {s} {m} a {d} {o}",
    "you see how a {c} {s} {m} a {d} {o}; everything else is {b}",
    "look at this {c} {s} {p} that {d} {o}, with a {b} background behind it",
)


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def _articles(text: str) -> str:
    """Replace "a" by "an" before a vowel."""
    words = text.split(" ")
    for i, (word, following) in enumerate(itertools.pairwise(words)):
        if word == "a" and following[0].lower() in "aeiou":
            words[i] = "an"
    return " ".join(words)


def _fill(scene: Scene, rng: np.random.Generator, words: Words, templates: tuple[str, ...]) -> str:
    values = scene.attributes
    act = "relation" if scene.relation else "motion"
    choice = {name: _pick(rng, words[name][values[name]]) for name in ("shape", "colour", act, "background")}
    third, rest = choice[act].split("|")
    participle, _, tail = rest.partition(" ")
    fields = {
        "c": choice["colour"],
        "s": choice["shape"],
        "b": choice["background"],
        "m": f"{third} {tail}".strip(),
        "p": f"{participle} {tail}".strip(),
    }
    if scene.relation:
        fields["o"] = _pick(rng, words["shape"][scene.other_shape])
        fields["d"] = _pick(rng, words["colour"][scene.other_colour])
    return _articles(_pick(rng, templates).format(**fields))


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene in training wording."""
    return _fill(scene, rng, SEEN, PAIR_TEMPLATES if scene.relation else TEMPLATES)


def paraphrase(scene: Scene, rng: np.random.Generator, strict: bool = False) -> str:
    """Describe a scene in a held-out sentence with held-out words.

    Shape, colour and motion (or relation) are each named by a word that occurs in no `caption`: all three if
    `strict`, else a random choice of them, at least one.
    """
    attributes = ("shape", "colour", "relation" if scene.relation else "motion")
    replaced = rng.integers(1, 2 ** len(attributes))  # a subset, as bits
    words = SEEN | {a: UNSEEN[a] for i, a in enumerate(attributes) if strict or replaced >> i & 1}
    return _fill(scene, rng, words, UNSEEN_PAIR_TEMPLATES if scene.relation else UNSEEN_TEMPLATES)
