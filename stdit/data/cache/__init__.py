"""Latents and text states, encoded once and kept in a folder of files that all runs on a data set share."""
