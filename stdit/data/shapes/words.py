"""Words for the values of world 32, with which the captions of the embedded data set are made.

Every attribute value has plain names, which are always in training, and a pool of synonyms. `more_words.py` has those
of the values that only world 64 has. Motions are written `moves|moving to the right`: third person, participle, then
what follows both.
"""

Words = dict[str, dict[str, tuple[str, ...]]]


def split(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(","))


def colour_names(colour: str) -> tuple[str, ...]:
    """Return the plain names of a colour."""
    return (colour, *(f"{how} {colour}" for how in ("bright", "deep", "vivid", "strong", "pure")))


_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
_SIDEWAYS = (
    "{0}, to the {0}, towards the {0}, toward the {0}, to the {0} side, toward the {0} edge, off to the {0}, "
    "from {1} to {0}, from the {1} to the {0}, to the {0}-hand side, across to the {0}, steadily {0}"
)

PLAIN_WORDS: Words = {
    "shape": {
        "circle": split("circle, round shape, circular shape, filled circle, solid circle, circular object"),
        "square": split("square, square shape, solid square, filled square, perfect square, square object"),
        "triangle": split("triangle, triangular shape, three-sided shape, solid triangle, filled triangle"),
        "cross": split("cross, plus sign, cross shape, plus shape, thick cross, solid cross, plus"),
    },
    "colour": {name: colour_names(name) for name in _COLOURS},
    "motion": {
        "right": split(_SIDEWAYS.format("right", "left")),
        "left": split(_SIDEWAYS.format("left", "right")),
        "up": split(
            "up, upward, upwards, straight up, to the top, toward the top, towards the top edge, up the "
            "screen,"
            "from bottom to top, steadily up"
        ),
        "down": split(
            "down, downward, downwards, straight down, to the bottom, toward the bottom, towards the bottom "
            "edge,"
            "down the screen, from top to bottom, steadily down"
        ),
        "grow": split(
            "grows|growing, gets|getting bigger, gets|getting larger, becomes|becoming bigger, "
            "becomes|becoming larger, grows|growing in size, increases|increasing in size, "
            "gets|getting bigger and bigger, keeps|keeping growing, grows|growing steadily"
        ),
        "shrink": split(
            "shrinks|shrinking, gets|getting smaller, gets|getting tinier, becomes|becoming smaller, "
            "becomes|becoming tiny, shrinks|shrinking in size, decreases|decreasing in size, "
            "gets|getting smaller and smaller, keeps|keeping shrinking, shrinks|shrinking steadily"
        ),
    },
    "background": {
        "black": split(
            "black, plain black, solid black, pure black, pitch black, jet black, deep black, coal black, "
            "completely black, midnight black, simple black, flat black"
        ),
        "grey": split(
            "grey, gray, plain grey, solid grey, neutral grey, medium grey, mid-grey, dark grey, stone grey, "
            "concrete grey, slate grey, dull grey, plain gray, simple grey, flat gray"
        ),
        "white": split(
            "white, plain white, solid white, pure white, bright white, snow white, clean white, blank "
            "white,"
            "paper white, completely white, simple white, flat white"
        ),
    },
}
"""Names that are always in training; for the four directions, phrases that follow a verb."""

THINGS: Words = {
    "shape": {
        "circle": split(
            "balloon, wheel, pearl, pellet, snowball, moon, planet, football, basketball, cannonball, "
            "plate, button, lollipop, penny, pebble, sun, blob"
        ),
        "square": split(
            "pane, window, stamp, chest, pixel, napkin, cushion, suitcase, board, carpet, poster, "
            "cabinet, parcel, package"
        ),
        "triangle": split(
            "mountain, pennant, sail, gable, roof, steeple, volcano, fir, peak, hill, thorn, fang, "
            "pizza slice, shark fin, witch hat, party cap"
        ),
        "cross": split(
            "hospital emblem, ambulance logo, pharmacy badge, junction, church token, swiss flag motif, "
            "first-aid icon, medical mark"
        ),
    },
    "colour": {
        "red": split(
            "tomato, strawberry, raspberry, beetroot, paprika, cranberry, brick-coloured, blood-"
            "coloured, wine-coloured, rose-coloured, rust-coloured, ketchup-coloured, poppy-coloured, "
            "lobster-coloured"
        ),
        "orange": split(
            "papaya, persimmon, cantaloupe, clementine, satsuma, pumpkin-coloured, carrot-coloured, "
            "flame-coloured, sunset-coloured, cheddar-coloured, mango-coloured, fox-coloured"
        ),
        "yellow": split(
            "custard, dandelion, buttercup, banana-coloured, sunflower-coloured, honey-coloured, corn-"
            "coloured, bumblebee-coloured, taxi-coloured, egg-yolk-coloured, straw-coloured"
        ),
        "green": split(
            "clover, fern-coloured, pea-coloured, avocado-coloured, pine-coloured, forest-coloured, "
            "basil-coloured, cucumber-coloured, frog-coloured, pickle-coloured, kiwi-coloured, ivy-"
            "coloured, spinach-coloured"
        ),
        "blue": split(
            "bluebell, sky-coloured, ocean-coloured, sea-coloured, blueberry-coloured, peacock-"
            "coloured, jeans-coloured, water-coloured, ink-coloured, lagoon-coloured"
        ),
        "purple": split(
            "blackcurrant, crocus, thistle, grape-coloured, eggplant-coloured, iris-coloured, fig-coloured"
        ),
    },
}
"""Things that have the shape or the colour: always in training, since they do not name it."""

SYNONYMS: Words = {
    "shape": {
        "circle": split(
            "ball, dot, sphere, bubble, disc, orb, coin, bead, globe, roundel, marble, spot, ring"
        ),
        "square": split(
            "box, block, tile, cube, crate, quadrilateral, rectangle, panel, brick, dice, slab, "
            "quadrangle, carton, container"
        ),
        "triangle": split("cone, tent, pyramid, wedge, arrowhead, tepee, trigon, spike, spearhead, prism"),
        "cross": split(
            "addition symbol, crucifix, crosshair, crossroads, intersection, four-armed figure, "
            "arithmetic glyph, crossing bars, X"
        ),
    },
    "colour": {
        "red": split(
            "scarlet, ruby, cherry, vermilion, crimson, carmine, maroon, burgundy, ruddy, cardinal, "
            "garnet, reddish, rosy"
        ),
        "orange": split(
            "tangerine, amber, apricot, mandarin, marmalade, ginger, orangey, copper, peachy, orangish, "
            "terracotta, coral"
        ),
        "yellow": split(
            "golden, gold, lemon, canary, mustard, maize, blonde, sunny, daffodil, saffron, buttery, "
            "yellowish, lemony, primrose"
        ),
        "green": split(
            "emerald, olive, jade, mint, shamrock, verdant, lime, leafy, grassy, mossy, greenish, pistachio"
        ),
        "blue": split(
            "azure, indigo, navy, sapphire, cobalt, ultramarine, cerulean, denim, bluish, cornflower, "
            "lapis, marine, prussian, beryl"
        ),
        "purple": split(
            "violet, lavender, orchid, lilac, mauve, plum, amethyst, aubergine, mulberry, purplish, "
            "heather, wisteria, periwinkle, fuchsia, magenta"
        ),
    },
    "motion": {
        "move": split(
            "moves|moving, slides|sliding, goes|going, travels|travelling, drifts|drifting, glides|gliding, "
            "shifts|shifting, heads|heading, cruises|cruising, proceeds|proceeding, journeys|journeying, "
            "wanders|wandering, slips|slipping, advances|advancing, creeps|creeping"
        ),
        "right": split("rightward, rightwards, eastward, eastwards, east"),
        "left": split("leftward, leftwards, westward, westwards, west"),
        "up": split(
            "rises|rising, climbs|climbing, ascends|ascending, lifts|lifting, soars|soaring, "
            "levitates|levitating, elevates|elevating, mounts|mounting, skyrockets|skyrocketing, "
            "launches|launching, surges|surging, hovers|hovering higher"
        ),
        "down": split(
            "falls|falling, drops|dropping, sinks|sinking, descends|descending, plummets|plummeting, "
            "plunges|plunging, dives|diving, tumbles|tumbling, lowers|lowering, nosedives|nosediving, "
            "sags|sagging, crashes|crashing"
        ),
        "grow": split(
            "expands|expanding, enlarges|enlarging, swells|swelling, inflates|inflating, "
            "balloons|ballooning,"
            "widens|widening, broadens|broadening, magnifies|magnifying, stretches|stretching, "
            "scales|scaling up,"
            "fattens|fattening, bulges|bulging, amplifies|amplifying, blooms|blooming"
        ),
        "shrink": split(
            "contracts|contracting, diminishes|diminishing, dwindles|dwindling, deflates|deflating, "
            "compresses|compressing, lessens|lessening, wanes|waning, reduces|reducing, "
            "shrivels|shrivelling,"
            "narrows|narrowing, withers|withering, collapses|collapsing, condenses|condensing, "
            "declines|declining"
        ),
    },
}
"""Synonyms, of which a random part is held out (`captions.HELD_OUT_SHARE`)."""
