"""Low-rank adapters (LoRA): which layers have one, their files, and other programs' names of their weights."""
