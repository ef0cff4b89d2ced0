"""Several processes: ``dp`` ranks split the batch, ``sp`` ranks share each video (dynamic sequence parallelism).

`stdit.parallel.config` has the settings, `stdit.parallel.sequence` shards the tokens of a video over ranks, and
`stdit.parallel.processes` starts, checks and coordinates the processes. See README.md for how to use them.
"""

from typing import TYPE_CHECKING

from stdit.lazy import lazy_getattr
from stdit.parallel.config import ParallelConfig, SamplingParallelConfig, TrainingParallelConfig

if TYPE_CHECKING:
    from stdit.parallel.processes.mesh import Mesh, build_mesh, resolve_sp
    from stdit.parallel.processes.parameters import full_tensor, local_tensor
    from stdit.parallel.processes.watchdog import Watchdog, build_watchdog
    from stdit.parallel.sequence.group import Group
    from stdit.parallel.sequence.layouts import Grid
    from stdit.parallel.sequence.sharding import TokenSharding

__all__ = [
    "Group",
    "Mesh",
    "ParallelConfig",
    "SamplingParallelConfig",
    "Grid",
    "TokenSharding",
    "TrainingParallelConfig",
    "Watchdog",
    "build_mesh",
    "build_watchdog",
    "full_tensor",
    "local_tensor",
    "resolve_sp",
]

__getattr__ = lazy_getattr(
    __name__,
    {
        "Group": "stdit.parallel.sequence.group",
        "Mesh": "stdit.parallel.processes.mesh",
        "Grid": "stdit.parallel.sequence.layouts",
        "TokenSharding": "stdit.parallel.sequence.sharding",
        "Watchdog": "stdit.parallel.processes.watchdog",
        "build_mesh": "stdit.parallel.processes.mesh",
        "build_watchdog": "stdit.parallel.processes.watchdog",
        "full_tensor": "stdit.parallel.processes.parameters",
        "local_tensor": "stdit.parallel.processes.parameters",
        "resolve_sp": "stdit.parallel.processes.mesh",
    },
)
