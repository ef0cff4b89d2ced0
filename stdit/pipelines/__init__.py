"""Sampling: prompts and conditions in, videos out.

Import the modules by name: this package imports nothing, so that reading a config stays light.
"""
