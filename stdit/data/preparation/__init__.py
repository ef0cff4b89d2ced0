"""Prepare a folder of videos for training: one file per step of prepare_data.py."""
