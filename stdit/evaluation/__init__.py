"""How good videos are: scores of how well they follow their prompts, and the videos that are scored."""
