"""The page and the server: ``python sample.py --serve``."""
