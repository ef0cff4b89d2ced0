"""The runs of a folder: what training has written, and starting and stopping it."""
