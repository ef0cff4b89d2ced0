"""The installed commands stdit-train, stdit-sample and stdit-prepare: each parses, composes and loops."""
