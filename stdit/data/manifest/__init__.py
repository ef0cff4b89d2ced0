"""Manifests: from rows of CSV, JSON lines, Parquet, folders or tar shards to a table of clips."""
