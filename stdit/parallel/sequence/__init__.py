"""Dynamic sequence parallelism: the tokens of one video sharded over a group of ranks (arXiv:2403.10266).

`group` holds the ranks and counts their traffic, `collectives` has the differentiable exchanges, `sharding` maps
tokens to ranks and switches the sharded axis, `planner` estimates traffic and memory and chooses sp.

To extend: a T x S grid belongs in `sharding`; other ways to cover an axis that stays sharded (Ulysses, ring, LASP)
become one module each here, built on `collectives`, with an entry in `planner`.
"""

from typing import TYPE_CHECKING

from stdit.lazy import lazy_getattr

if TYPE_CHECKING:
    from stdit.parallel.sequence.collectives import all_gather, all_to_all, reduce_scatter
    from stdit.parallel.sequence.group import Group, Traffic
    from stdit.parallel.sequence.planner import ParallelDims, Workload, choose_sp
    from stdit.parallel.sequence.sharding import ShardAxis, TokenSharding

__all__ = [
    "Group",
    "ParallelDims",
    "ShardAxis",
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
        "ShardAxis": "stdit.parallel.sequence.sharding",
        "TokenSharding": "stdit.parallel.sequence.sharding",
        "Traffic": "stdit.parallel.sequence.group",
        "Workload": "stdit.parallel.sequence.planner",
        "all_gather": "stdit.parallel.sequence.collectives",
        "all_to_all": "stdit.parallel.sequence.collectives",
        "choose_sp": "stdit.parallel.sequence.planner",
        "reduce_scatter": "stdit.parallel.sequence.collectives",
    },
)
