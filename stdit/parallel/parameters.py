"""How the weights of a model, and what training keeps beside them, lie on the ranks."""

FLOAT = 4
KEPT = 5
"""Numbers for each weight: itself, its gradient, AdamW's two moments, its average."""


def state_bytes(parameter_count: int, ranks: int, sharded: bool) -> int:
    """Bytes that a rank keeps between steps of a model with so many float32 weights.

    Replicated, a rank keeps all of it; sharded over the ranks, its share (Rajbhandari et al. 2020,
    arXiv:1910.02054, figure 1, stage 3).
    """
    mine = -(-parameter_count // ranks) if sharded else parameter_count
    return KEPT * FLOAT * mine
