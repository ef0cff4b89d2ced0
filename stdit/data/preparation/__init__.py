"""From a folder of videos to a manifest worth training on: one file for each sub-command of prepare_data.py."""
