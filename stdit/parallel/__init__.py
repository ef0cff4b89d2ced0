"""Dynamic sequence parallelism: one video on many ranks."""
