"""Recognise what a video of shapes shows, from its pixels, to score generated clips.

It knows the vocabulary of a world and nothing of the prompt. It should accept what a person would accept (slight
blur, faint noise, compression artefacts) and reject the rest: an attribute that cannot be recognised is None. It
looks at videos at their own size; lengths are written in pixels of a frame whose shorter side is 32.
"""

from stdit.data.shapes.checker.background import background_noise, patch_borders
from stdit.data.shapes.checker.verdict import Verdict, check, compare, score

__all__ = ["Verdict", "background_noise", "check", "compare", "patch_borders", "score"]
