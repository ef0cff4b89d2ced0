"""The embedded data set "shapes": clips of moving shapes, their captions, and a checker of generated clips."""
