"""The embedded data set "shapes": clips of one moving shape, their captions, and a checker of generated clips."""
