"""Latents and text states encoded once, in a folder of shards that runs share and training reads."""
