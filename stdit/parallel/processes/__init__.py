"""The processes of a run: rendezvous, mesh, watchdog, and sharding of weights and checkpoints.

`rendezvous` and `device` join the processes, `mesh` arranges them as dp x cfg x sp and exchanges errors,
`step_exchange` is the one collective of a training step, `watchdog` ends all when one dies or hangs, `parameters`
replicates or shards the model, `storage` divides checkpoints among the ranks, `memory` returns the bytes that a
process may use.
"""

from typing import TYPE_CHECKING

from stdit.lazy import lazy_getattr

if TYPE_CHECKING:
    from stdit.parallel.processes.mesh import Mesh, build_mesh, resolve_sp
    from stdit.parallel.processes.parameters import full_tensor, local_tensor, replicate_model, shard_model
    from stdit.parallel.processes.watchdog import Watchdog, build_watchdog

__all__ = [
    "Mesh",
    "Watchdog",
    "build_mesh",
    "build_watchdog",
    "full_tensor",
    "local_tensor",
    "replicate_model",
    "resolve_sp",
    "shard_model",
]

__getattr__ = lazy_getattr(
    __name__,
    {
        "Mesh": "stdit.parallel.processes.mesh",
        "Watchdog": "stdit.parallel.processes.watchdog",
        "build_mesh": "stdit.parallel.processes.mesh",
        "build_watchdog": "stdit.parallel.processes.watchdog",
        "full_tensor": "stdit.parallel.processes.parameters",
        "local_tensor": "stdit.parallel.processes.parameters",
        "replicate_model": "stdit.parallel.processes.parameters",
        "resolve_sp": "stdit.parallel.processes.mesh",
        "shard_model": "stdit.parallel.processes.parameters",
    },
)
