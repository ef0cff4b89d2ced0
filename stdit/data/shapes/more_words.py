"""Words for the values that only world 64 has, or that are new in a small world; see words.py.

A value that is new has a few names that share one word, by which it is learned.
"""

from stdit.data.shapes.words import Words, colour_names, split

MORE_PLAIN_WORDS: Words = {
    "shape": {
        "star": split("star, star shape, five-pointed star, filled star, solid star, star sign"),
        "heart": split("heart, heart shape, love heart, filled heart, solid heart, heart sign"),
        # not "ring": it is a word for circles in world 32, with which a model may have been trained
        "ring": split("hoop, hoop shape, round hoop, hoop object"),
    },
    "colour": {name: colour_names(name) for name in ("cyan", "pink")},
    "motion": {
        "turn": split(
            "turns|turning, rotates|rotating, turns|turning around, turns|turning on the spot, "
            "rotates|rotating in place, turns|turning about its middle, keeps|keeping turning, "
            "keeps|keeping rotating, turns|turning steadily, rotates|rotating slowly, turns|turning like a wheel"
        ),
        # not "diagonally": a model of world 32 draws worse outlines at it, which a motion adapter cannot mend
        "diagonal": split(
            "moves|moving obliquely, slides|sliding obliquely, goes|going obliquely, travels|travelling obliquely, "
            "shifts|shifting obliquely, glides|gliding obliquely, heads|heading obliquely"
        ),
        "bounce": split(
            "bounces|bouncing, bounces|bouncing up and down, bounces|bouncing on the floor, "
            "bounces|bouncing off the ground, keeps|keeping bouncing, bounces|bouncing again and again, "
            "bounces|bouncing twice, bounces|bouncing on the ground, bounces|bouncing like rubber, "
            "jumps|jumping up and down, bounces|bouncing in place"
        ),
        "circling": split(
            "circles|circling, moves|moving in a circle, goes|going in a circle, travels|travelling in a circle, "
            "goes|going round and round, circles|circling around, moves|moving along a circle, "
            "goes|going around in circles, orbits|orbiting the middle, circles|circling around the middle, "
            "glides|gliding in a circle"
        ),
    },
    "background": {
        "dark to light": split(
            "dark-to-light, dark-to-light gradient, brightening, brightening gradient, dark-topped, "
            "dark-topped gradient, black-to-white, black-to-white gradient, gradually brightening, "
            "bottom-lit, smoothly brightening, grey dark-to-light, dark-topped grey"
        ),
        "light to dark": split(
            "light-to-dark, light-to-dark gradient, darkening, darkening gradient, light-topped, "
            "light-topped gradient, white-to-black, white-to-black gradient, gradually darkening, "
            "top-lit, smoothly darkening, grey light-to-dark, light-topped grey"
        ),
        "vertical stripes": split(
            "vertically striped, vertical-striped, vertically striped grey, vertical stripe, upright-striped, "
            "vertically banded, vertical-banded, grey vertically striped, vertically lined, "
            "column-striped, plain vertically striped, vertical stripe pattern"
        ),
        "horizontal stripes": split(
            "horizontally striped, horizontal-striped, horizontally striped grey, horizontal stripe, "
            "level-striped, horizontally banded, horizontal-banded, grey horizontally striped, "
            "horizontally lined, row-striped, plain horizontally striped, horizontal stripe pattern"
        ),
    },
    "relation": {
        "orbits": split(
            "orbits|orbiting, circles|circling around, goes|going around, moves|moving around, "
            "moves|moving in a circle around, travels|travelling around, keeps|keeping going around, "
            "circles|circling, goes|going round and round"
        ),
        "approaches": split(
            "approaches|approaching, moves|moving towards, comes|coming closer to, gets|getting closer to, "
            "goes|going up to, heads|heading for, moves|moving closer to, slides|sliding towards, "
            "comes|coming near"
        ),
        "leaves": split(
            "leaves|leaving, moves|moving away from, goes|going away from, gets|getting farther from, "
            "slides|sliding away from, departs|departing from, moves|moving off from, heads|heading away from, "
            "travels|travelling away from"
        ),
        "follows": split(
            "follows|following, goes|going after, moves|moving behind, comes|coming after, "
            "keeps|keeping behind, moves|moving along behind, travels|travelling behind, goes|going behind, "
            "stays|staying behind"
        ),
    },
}

MORE_THINGS: Words = {
    "shape": {
        "star": split(
            "starfish, sheriff badge, sea star, christmas tree topper, film award star, star sticker, "
            "star cookie, gold medal star, hotel rating star, night sky star, magic wand tip"
        ),
        "heart": split(
            "love letter seal, heart sticker, heart cookie, playing card heart, heart locket, heart pendant, "
            "love token, heart cake, wedding heart, heart cushion"
        ),
    },
    "colour": {
        "cyan": split(
            "pool-coloured, glacier-coloured, tropical-sea-coloured, swimming-pool-coloured, ice-coloured, "
            "hummingbird-coloured, mouthwash-coloured, toothpaste-coloured, dragonfly-coloured"
        ),
        "pink": split(
            "flamingo-coloured, bubblegum-coloured, candyfloss-coloured, piglet-coloured, peony-coloured, "
            "carnation-coloured, apple-blossom-coloured, lipstick-coloured, raspberry-sorbet-coloured"
        ),
    },
}

MORE_SYNONYMS: Words = {
    "shape": {
        "star": split(
            "pentagram, asterisk, sparkle, starburst, pentacle, twinkler, supernova, starlet, sparkler, nova"
        ),
        "heart": split("valentine, sweetheart, cardioid, ticker, amour, lovemark, darling, beloved, cupid"),
    },
    "colour": {
        "cyan": split(
            "turquoise, teal, aqua, aquamarine, seafoam, verdigris, glacial, cyanish, topaz, curacao, lagoony"
        ),
        "pink": split(
            "pinkish, blush, bubblegum, flamingo, salmon, taffy, sakura, cerise, candyfloss, fondant"
        ),
    },
    "motion": {
        "turn": split(
            "spins|spinning, twirls|twirling, whirls|whirling, pivots|pivoting, swivels|swivelling, "
            "gyrates|gyrating, pirouettes|pirouetting, twists|twisting, cartwheels|cartwheeling, "
            "swirls|swirling, revolves|revolving"
        ),
        "bounce": split(
            "hops|hopping, rebounds|rebounding, springs|springing, leaps|leaping, jounces|jouncing, "
            "dribbles|dribbling, ricochets|ricocheting, skips|skipping, pogos|pogoing, bobs|bobbing, "
            "trampolines|trampolining"
        ),
        "circling": split(
            "loops|looping, laps|lapping, circulates|circulating, rounds|rounding, "
            "roundtrips|roundtripping, cycles|cycling, carousels|carouselling"
        ),
    },
    "relation": {
        "orbits": split(
            "rings|ringing, encircles|encircling, circuits|circuiting, circumnavigates|circumnavigating"
        ),
        "approaches": split("nears|nearing, reaches|reaching out for, meets|meeting, visits|visiting"),
        "leaves": split(
            "flees|fleeing, abandons|abandoning, deserts|deserting, escapes|escaping, quits|quitting"
        ),
        "follows": split(
            "trails|trailing, chases|chasing, pursues|pursuing, tails|tailing, shadows|shadowing, hunts|hunting"
        ),
    },
}
"""Synonyms, of which a random part is held out."""
