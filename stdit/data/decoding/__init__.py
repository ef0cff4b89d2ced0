"""Decoding: from video and image files to frames of one size."""
