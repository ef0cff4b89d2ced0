"""Captions of the embedded data set: many wordings for training, and paraphrases with words never trained on.

Every attribute has a list of training wordings (`SEEN`) and a list of reserved ones (`UNSEEN`). A paraphrase
takes all four attributes from the reserved lists and one of the reserved templates, so that what names shape,
colour, motion and background is new to the model, if not to its text encoder.

Verb phrases are written `moves|moving to the right`: third person, participle, then what follows both.
"""

import numpy as np

from stdit.data.shapes.render import Scene

Words = dict[str, dict[str, tuple[str, ...]]]


def _split(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(","))


def _combine(verbs: str, places: str) -> tuple[str, ...]:
    return tuple(f"{verb} {place}" for verb in _split(verbs) for place in _split(places))


_MOVES = (
    "moves|moving, slides|sliding, goes|going, travels|travelling, drifts|drifting, glides|gliding, "
    "shifts|shifting, floats|floating, heads|heading"
)
_SIDEWAYS = (
    "{0}, to the {0}, towards the {0}, toward the {0}, to the {0} side, toward the {0} edge, off to the {0}, "
    "from {1} to {0}, from the {1} to the {0}, to the {0}-hand side, across to the {0}, steadily {0}"
)
_MOVES_UNSEEN = "cruises|cruising, proceeds|proceeding, sails|sailing, journeys|journeying"

SEEN: Words = {
    "shape": {
        "circle": _split(
            "circle, ball, dot, sphere, bubble, round shape, circular shape, round spot, filled circle, "
            "round ball, round blob, solid circle, circular object, perfect circle, round object, "
            "simple circle"
        ),
        "square": _split(
            "square, box, block, tile, square shape, square block, solid square, square tile, filled square, "
            "square box, square patch, perfect square, square piece, square object, four-sided box, "
            "simple square"
        ),
        "triangle": _split(
            "triangle, cone, tent, triangular shape, three-sided shape, three-cornered shape, "
            "solid triangle, filled triangle, pointed triangle, triangular block, triangular tile, "
            "upright triangle, triangular object, triangular piece, perfect triangle, simple triangle"
        ),
        "cross": _split(
            "cross, plus sign, plus, plus shape, cross shape, cross sign, cross-shaped object, thick cross, "
            "solid cross, plus mark, first-aid cross, medical cross, Greek cross, filled cross, "
            "perfect cross, simple cross"
        ),
    },
    "colour": {
        "red": _split(
            "red, scarlet, ruby, cherry, vermilion, bright red, deep red, vivid red, cherry red, tomato red, "
            "blood red, fire-engine red, brick red, ruby red, strong red, rose red"
        ),
        "orange": _split(
            "orange, tangerine, amber, bright orange, deep orange, vivid orange, carrot orange, "
            "pumpkin orange, burnt orange, safety orange, sunset orange, fiery orange, carrot-coloured, "
            "pumpkin-coloured, strong orange"
        ),
        "yellow": _split(
            "yellow, golden, gold, lemon, canary, bright yellow, vivid yellow, lemon yellow, sunny yellow, "
            "banana yellow, canary yellow, sunflower yellow, golden yellow, butter yellow, strong yellow"
        ),
        "green": _split(
            "green, emerald, olive, bright green, deep green, vivid green, grass green, forest green, "
            "leaf green, apple green, emerald green, moss green, jungle green, pea green, strong green"
        ),
        "blue": _split(
            "blue, azure, indigo, bright blue, deep blue, vivid blue, royal blue, ocean blue, electric blue, "
            "azure blue, ink blue, denim blue, marine blue, strong blue, sky blue"
        ),
        "purple": _split(
            "purple, violet, lavender, grape, orchid, bright purple, deep purple, vivid purple, "
            "royal purple, grape purple, violet purple, lavender purple, purplish, strong purple, rich purple"
        ),
    },
    "motion": {
        "right": _combine(_MOVES, _SIDEWAYS.format("right", "left")),
        "left": _combine(_MOVES, _SIDEWAYS.format("left", "right")),
        "up": _combine(
            _MOVES,
            "up, upward, upwards, straight up, to the top, toward the top, towards the top edge, "
            "up the screen, from bottom to top, steadily up",
        )
        + 4
        * _split(
            "rises|rising, climbs|climbing, ascends|ascending, lifts|lifting up, rises|rising up, "
            "climbs|climbing upward, rises|rising to the top, climbs|climbing to the top, "
            "rises|rising steadily"
        ),
        "down": _combine(
            _MOVES,
            "down, downward, downwards, straight down, to the bottom, toward the bottom, "
            "towards the bottom edge, down the screen, from top to bottom, steadily down",
        )
        + 4
        * _split(
            "falls|falling, drops|dropping, sinks|sinking, descends|descending, falls|falling down, "
            "drops|dropping down, sinks|sinking to the bottom, falls|falling to the bottom, "
            "sinks|sinking steadily"
        ),
        "grow": _split(
            "grows|growing, expands|expanding, enlarges|enlarging, swells|swelling, gets|getting bigger, "
            "gets|getting larger, becomes|becoming bigger, becomes|becoming larger, grows|growing in size, "
            "increases|increasing in size, grows|growing bigger, grows|growing larger, scales|scaling up, "
            "expands|expanding outward, gets|getting bigger and bigger, keeps|keeping growing, "
            "grows|growing steadily"
        ),
        "shrink": _split(
            "shrinks|shrinking, contracts|contracting, diminishes|diminishing, gets|getting smaller, "
            "gets|getting tinier, becomes|becoming smaller, becomes|becoming tiny, "
            "shrinks|shrinking in size, decreases|decreasing in size, reduces|reducing in size, "
            "grows|growing smaller, scales|scaling down, shrinks|shrinking inward, "
            "gets|getting smaller and smaller, keeps|keeping shrinking, shrinks|shrinking away, "
            "shrinks|shrinking steadily"
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
            "white, plain white, solid white, pure white, bright white, snow white, clean white, "
            "blank white, paper white, completely white, simple white, flat white"
        ),
    },
}

UNSEEN: Words = {
    "shape": {
        "circle": _split("disc, orb, coin, bead, globe"),
        "square": _split("cube, crate, quadrilateral, rectangle, panel"),
        "triangle": _split("pyramid, wedge, arrowhead, tepee, delta"),
        "cross": _split("crucifix, crosshair, addition symbol, positive symbol, crossroads"),
    },
    "colour": {
        "red": _split("crimson, carmine, maroon, burgundy, strawberry"),
        "orange": _split("apricot, mandarin, clementine, marmalade, ginger"),
        "yellow": _split("mustard, dandelion, buttercup, custard, maize"),
        "green": _split("jade, mint, shamrock, verdant, fern"),
        "blue": _split("navy, sapphire, cobalt, ultramarine, cerulean"),
        "purple": _split("lilac, mauve, plum, amethyst, aubergine"),
    },
    "motion": {
        "right": _combine(_MOVES_UNSEEN, "rightward, rightwards, eastward, east"),
        "left": _combine(_MOVES_UNSEEN, "leftward, leftwards, westward, west"),
        "up": _split(
            "soars|soaring, levitates|levitating, soars|soaring skyward, sails|sailing skyward, "
            "cruises|cruising northward, elevates|elevating"
        ),
        "down": _split(
            "plummets|plummeting, plunges|plunging, dives|diving, tumbles|tumbling, "
            "cruises|cruising southward, lowers|lowering"
        ),
        "grow": _split(
            "inflates|inflating, balloons|ballooning, widens|widening, broadens|broadening, "
            "magnifies|magnifying"
        ),
        "shrink": _split(
            "deflates|deflating, dwindles|dwindling, compresses|compressing, lessens|lessening, wanes|waning"
        ),
    },
    "background": {
        "black": _split("ebony, onyx, inky, sooty, unlit"),
        "grey": _split("ashen, charcoal, pewter, leaden, graphite"),
        "white": _split("ivory, alabaster, pearly, chalky, porcelain"),
    },
}

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
    "a {s} coloured {c} {p} across a {b} screen",
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
    """Turn "a" into "an" before a vowel."""
    words = text.split(" ")
    for i, (word, following) in enumerate(zip(words, words[1:], strict=False)):
        if word == "a" and following[0].lower() in "aeiou":
            words[i] = "an"
    return " ".join(words)


def _fill(scene: Scene, rng: np.random.Generator, words: Words, templates: tuple[str, ...]) -> str:
    values = scene.attributes
    choice = {name: _pick(rng, options[values[name]]) for name, options in words.items()}
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


def paraphrase(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene so that no word for shape, colour, motion or background occurs in any `caption`."""
    return _fill(scene, rng, UNSEEN, UNSEEN_TEMPLATES)
