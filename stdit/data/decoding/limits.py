"""Limits of sizes; imports nothing, so that settings can use them without a decoder."""

MAX_DIMENSION = 16384
"""Most frames of a clip, pixels of a side, or clips of a batch: a larger number is a typing error."""
