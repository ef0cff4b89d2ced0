"""Captions of the embedded data set: many wordings for training, and paraphrases with held-out words.

Every attribute value has plain names, which are always in training, and a pool of synonyms, of which a fixed
random part is held out. A paraphrase uses held-out words for some or all of shape, colour and motion, in a held-out
sentence.

Motions are written `moves|moving to the right`: third person, participle, then what follows both.
"""

import itertools

import numpy as np

from stdit.data.shapes.render import Scene

Words = dict[str, dict[str, tuple[str, ...]]]

HELD_OUT_SHARE = 0.2
"""Share of each pool of synonyms that is held out of training captions."""


def _split(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(","))


def _combine(verbs: tuple[str, ...], places: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{verb} {place}" for verb in verbs for place in places)


_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
_SIDEWAYS = (
    "{0}, to the {0}, towards the {0}, toward the {0}, to the {0} side, toward the {0} edge, off to the {0}, "
    "from {1} to {0}, from the {1} to the {0}, to the {0}-hand side, across to the {0}, steadily {0}"
)

PLAIN_WORDS: Words = {
    "shape": {
        "circle": _split("circle, round shape, circular shape, filled circle, solid circle, circular object"),
        "square": _split("square, square shape, solid square, filled square, perfect square, square object"),
        "triangle": _split("triangle, triangular shape, three-sided shape, solid triangle, filled triangle"),
        "cross": _split("cross, plus sign, cross shape, plus shape, thick cross, solid cross, plus"),
    },
    "colour": {
        c: (c, f"bright {c}", f"deep {c}", f"vivid {c}", f"strong {c}", f"pure {c}") for c in _COLOURS
    },
    "motion": {
        "right": _split(_SIDEWAYS.format("right", "left")),
        "left": _split(_SIDEWAYS.format("left", "right")),
        "up": _split(
            "up, upward, upwards, straight up, to the top, toward the top, towards the top edge, up the "
            "screen,"
            "from bottom to top, steadily up"
        ),
        "down": _split(
            "down, downward, downwards, straight down, to the bottom, toward the bottom, towards the bottom "
            "edge,"
            "down the screen, from top to bottom, steadily down"
        ),
        "grow": _split(
            "grows|growing, gets|getting bigger, gets|getting larger, becomes|becoming bigger, "
            "becomes|becoming larger, grows|growing in size, increases|increasing in size, "
            "gets|getting bigger and bigger, keeps|keeping growing, grows|growing steadily"
        ),
        "shrink": _split(
            "shrinks|shrinking, gets|getting smaller, gets|getting tinier, becomes|becoming smaller, "
            "becomes|becoming tiny, shrinks|shrinking in size, decreases|decreasing in size, "
            "gets|getting smaller and smaller, keeps|keeping shrinking, shrinks|shrinking steadily"
        ),
    },
    "background": {
        "black": _split(
            "black, plain black, solid black, pure black, pitch black, jet black, deep black, coal black, "
            "completely black, midnight black, simple black, flat black"
        ),
        "grey": _split(
            "grey, gray, plain grey, solid grey, neutral grey, medium grey, mid-grey, dark grey, stone grey, "
            "concrete grey, slate grey, dull grey, plain gray, simple grey, flat gray"
        ),
        "white": _split(
            "white, plain white, solid white, pure white, bright white, snow white, clean white, blank "
            "white,"
            "paper white, completely white, simple white, flat white"
        ),
    },
}
"""Names that are always in training; for the four directions, phrases that follow a verb."""

THINGS: Words = {
    "shape": {
        "circle": _split(
            "balloon, wheel, pearl, pellet, snowball, moon, planet, football, basketball, cannonball, "
            "plate, button, lollipop, penny, pebble, sun, blob"
        ),
        "square": _split(
            "pane, window, stamp, chest, pixel, napkin, cushion, suitcase, board, carpet, poster, "
            "cabinet, parcel, package"
        ),
        "triangle": _split(
            "mountain, pennant, sail, gable, roof, steeple, volcano, fir, peak, hill, thorn, fang, "
            "pizza slice, shark fin, witch hat, party cap"
        ),
        "cross": _split(
            "hospital emblem, ambulance logo, pharmacy badge, junction, church token, swiss flag motif, "
            "first-aid icon, medical mark"
        ),
    },
    "colour": {
        "red": _split(
            "tomato, strawberry, raspberry, beetroot, paprika, cranberry, brick-coloured, blood-"
            "coloured, wine-coloured, rose-coloured, rust-coloured, ketchup-coloured, poppy-coloured, "
            "lobster-coloured"
        ),
        "orange": _split(
            "papaya, persimmon, cantaloupe, clementine, satsuma, pumpkin-coloured, carrot-coloured, "
            "flame-coloured, sunset-coloured, cheddar-coloured, mango-coloured, fox-coloured"
        ),
        "yellow": _split(
            "custard, dandelion, buttercup, banana-coloured, sunflower-coloured, honey-coloured, corn-"
            "coloured, bumblebee-coloured, taxi-coloured, egg-yolk-coloured, straw-coloured"
        ),
        "green": _split(
            "clover, fern-coloured, pea-coloured, avocado-coloured, pine-coloured, forest-coloured, "
            "basil-coloured, cucumber-coloured, frog-coloured, pickle-coloured, kiwi-coloured, ivy-"
            "coloured, spinach-coloured"
        ),
        "blue": _split(
            "bluebell, sky-coloured, ocean-coloured, sea-coloured, blueberry-coloured, peacock-"
            "coloured, jeans-coloured, water-coloured, ink-coloured, lagoon-coloured"
        ),
        "purple": _split(
            "blackcurrant, crocus, thistle, grape-coloured, eggplant-coloured, iris-coloured, fig-coloured"
        ),
    },
}
"""Things that have the shape or the colour: always in training, since they do not name it."""

SYNONYMS: Words = {
    "shape": {
        "circle": _split(
            "ball, dot, sphere, bubble, disc, orb, coin, bead, globe, roundel, marble, spot, ring"
        ),
        "square": _split(
            "box, block, tile, cube, crate, quadrilateral, rectangle, panel, brick, dice, slab, "
            "quadrangle, carton, container"
        ),
        "triangle": _split("cone, tent, pyramid, wedge, arrowhead, tepee, trigon, spike, spearhead, prism"),
        "cross": _split(
            "addition symbol, crucifix, crosshair, crossroads, intersection, four-armed figure, "
            "arithmetic glyph, crossing bars, X"
        ),
    },
    "colour": {
        "red": _split(
            "scarlet, ruby, cherry, vermilion, crimson, carmine, maroon, burgundy, ruddy, cardinal, "
            "garnet, reddish, rosy"
        ),
        "orange": _split(
            "tangerine, amber, apricot, mandarin, marmalade, ginger, orangey, copper, peachy, orangish, "
            "terracotta, coral"
        ),
        "yellow": _split(
            "golden, gold, lemon, canary, mustard, maize, blonde, sunny, daffodil, saffron, buttery, "
            "yellowish, lemony, primrose"
        ),
        "green": _split(
            "emerald, olive, jade, mint, shamrock, verdant, lime, leafy, grassy, mossy, greenish, pistachio"
        ),
        "blue": _split(
            "azure, indigo, navy, sapphire, cobalt, ultramarine, cerulean, denim, bluish, cornflower, "
            "lapis, marine, prussian, beryl"
        ),
        "purple": _split(
            "violet, lavender, orchid, lilac, mauve, plum, amethyst, aubergine, mulberry, purplish, "
            "heather, wisteria, periwinkle, fuchsia, magenta"
        ),
    },
    "motion": {
        "move": _split(
            "moves|moving, slides|sliding, goes|going, travels|travelling, drifts|drifting, glides|gliding, "
            "shifts|shifting, heads|heading, cruises|cruising, proceeds|proceeding, journeys|journeying, "
            "wanders|wandering, slips|slipping, advances|advancing, creeps|creeping"
        ),
        "right": _split("rightward, rightwards, eastward, eastwards, east"),
        "left": _split("leftward, leftwards, westward, westwards, west"),
        "up": _split(
            "rises|rising, climbs|climbing, ascends|ascending, lifts|lifting, soars|soaring, "
            "levitates|levitating, elevates|elevating, mounts|mounting, skyrockets|skyrocketing, "
            "launches|launching, surges|surging, hovers|hovering higher"
        ),
        "down": _split(
            "falls|falling, drops|dropping, sinks|sinking, descends|descending, plummets|plummeting, "
            "plunges|plunging, dives|diving, tumbles|tumbling, lowers|lowering, nosedives|nosediving, "
            "sags|sagging, crashes|crashing"
        ),
        "grow": _split(
            "expands|expanding, enlarges|enlarging, swells|swelling, inflates|inflating, "
            "balloons|ballooning,"
            "widens|widening, broadens|broadening, magnifies|magnifying, stretches|stretching, "
            "scales|scaling up,"
            "fattens|fattening, bulges|bulging, amplifies|amplifying, blooms|blooming"
        ),
        "shrink": _split(
            "contracts|contracting, diminishes|diminishing, dwindles|dwindling, deflates|deflating, "
            "compresses|compressing, lessens|lessening, wanes|waning, reduces|reducing, "
            "shrivels|shrivelling,"
            "narrows|narrowing, withers|withering, collapses|collapsing, condenses|condensing, "
            "declines|declining"
        ),
    },
}
"""Synonyms, of which a random part is held out."""


def _hold_out(pool: Words, share: float) -> tuple[Words, Words]:
    """Split every pool at random, by a fixed seed, into (kept, held out)."""
    rng = np.random.default_rng(0)
    kept: Words = {}
    held: Words = {}
    for attribute, values in pool.items():
        for value, words in values.items():
            chosen = set(rng.permutation(len(words))[: max(2, round(share * len(words)))].tolist())
            kept.setdefault(attribute, {})[value] = tuple(w for i, w in enumerate(words) if i not in chosen)
            held.setdefault(attribute, {})[value] = tuple(w for i, w in enumerate(words) if i in chosen)
    return kept, held


def _build() -> tuple[Words, Words]:
    """Return all wordings of training, and all that are held out."""
    seen, unseen = _hold_out(SYNONYMS, HELD_OUT_SHARE)
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
    seen["background"] = PLAIN_WORDS["background"]
    return seen, unseen


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
    choice = {
        name: _pick(rng, words[name][values[name]]) for name in ("shape", "colour", "motion", "background")
    }
    third, rest = choice["motion"].split("|")
    participle, _, tail = rest.partition(" ")
    text = _pick(rng, templates).format(
        c=choice["colour"],
        s=choice["shape"],
        b=choice["background"],
        m=f"{third} {tail}".strip(),
        p=f"{participle} {tail}".strip(),
    )
    return _articles(text)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene in training wording."""
    return _fill(scene, rng, SEEN, TEMPLATES)


def paraphrase(scene: Scene, rng: np.random.Generator, strict: bool = False) -> str:
    """Describe a scene in a held-out sentence with held-out words.

    Shape, colour and motion are each named by a word that occurs in no `caption`: all three if `strict`,
    else a random choice of them, at least one.
    """
    attributes = ("shape", "colour", "motion")
    replaced = rng.integers(1, 2 ** len(attributes))  # a subset, as bits
    words = SEEN | {a: UNSEEN[a] for i, a in enumerate(attributes) if strict or replaced >> i & 1}
    return _fill(scene, rng, words, UNSEEN_TEMPLATES)
