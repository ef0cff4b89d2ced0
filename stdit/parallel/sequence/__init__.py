"""Dynamic sequence parallelism: the tokens of one video sharded over a group of ranks (arXiv:2403.10266).

`group` holds the ranks and counts their traffic, `layouts` says which rank has which tokens, `stages` in which layout
each block runs, `collectives` has the differentiable exchanges, `sharding` moves tokens between layouts and reaches
those of other ranks, with `usp` for attention; `traffic` counts what all this sends, `planner` estimates memory and
chooses sp.
"""

from typing import TYPE_CHECKING

from stdit.lazy import lazy_getattr

if TYPE_CHECKING:
    from stdit.parallel.sequence.collectives import all_gather, all_to_all, reduce_scatter
    from stdit.parallel.sequence.group import Group, Traffic
    from stdit.parallel.sequence.layouts import Grid
    from stdit.parallel.sequence.planner import ParallelDims, Workload, choose_sp
    from stdit.parallel.sequence.sharding import TokenSharding

__all__ = [
    "Group",
    "ParallelDims",
    "Grid",
    "TokenSharding",
    "Traffic",
    "Workload",
    "all_gather",
    "all_to_all",
    "choose_sp",
    "reduce_scatter",
]

__getattr__ = lazy_getattr(
    __name__,
    {
        "Group": "stdit.parallel.sequence.group",
        "ParallelDims": "stdit.parallel.sequence.planner",
        "Grid": "stdit.parallel.sequence.layouts",
        "TokenSharding": "stdit.parallel.sequence.sharding",
        "Traffic": "stdit.parallel.sequence.group",
        "Workload": "stdit.parallel.sequence.planner",
        "all_gather": "stdit.parallel.sequence.collectives",
        "all_to_all": "stdit.parallel.sequence.collectives",
        "choose_sp": "stdit.parallel.sequence.planner",
        "reduce_scatter": "stdit.parallel.sequence.collectives",
    },
)
