"""The embedded data set: one coloured shape that moves or changes size, its captions, and a checker."""
