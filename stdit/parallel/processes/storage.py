"""Tensors of a checkpoint on disk: written by all ranks, read by any other number of ranks.

torch.distributed.checkpoint plans which rank writes and which rank reads which part. Its own file format is read by
pickle, which can execute code. These files are safetensors in the layout of its HuggingFaceStorageReader: the header
says where in the full tensor each chunk belongs. With one rank they are plain safetensors.

torch.distributed.checkpoint is imported where it is used: importing it is slow, and many commands do not need it.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from stdit.errors import UserError
from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.processes.parameters import local_tensor
from stdit.umask import apply_umask

if TYPE_CHECKING:
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

STEMS = {"model": "diffusion_pytorch_model", "ema": "ema", "optimizer": "optimizer"}
"""Stem of the file names in the folder of each part of a state; the model's is the one that diffusers looks for. Of a
part within another folder, such as score/model, the last name counts."""
PLACEMENT = "DCP_SHARDING_INFO"
"""Key of the safetensors header in which HuggingFaceStorageReader looks for the offsets of the chunks."""

StateDicts = Mapping[str, Mapping[str, Tensor]]
"""Tensors by part (model, ema, optimizer) and name: full on every rank, or sharded (DTensor)."""


@dataclass(frozen=True)
class TensorChunk:
    """The part of a tensor that one rank writes."""

    tensor: Tensor
    offsets: tuple[int, ...]
    """Position of its first element in the full tensor."""


StateChunks = dict[str, dict[str, TensorChunk]]
"""What one rank writes, by part and name."""


@dataclass
class SavePlan:
    """Which rank writes what: of sharded tensors each its shard; replicated tensors are divided among the ranks."""

    mesh: Mesh
    planned: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = field(default_factory=dict)
    """By the names of all tensors, the offsets of those that this rank writes. Cached: names rarely change."""

    def chunks(self, state: StateDicts) -> StateChunks:
        """Return what this rank writes of ``state``, without a copy; every rank must call this."""
        return {part: self._chunks_of(dict(tensors)) for part, tensors in state.items()}

    def _chunks_of(self, tensors: dict[str, Tensor]) -> dict[str, TensorChunk]:
        names = tuple(tensors)
        if names not in self.planned:
            self.planned[names] = self._plan(tensors)
        return {
            name: TensorChunk(local_tensor(tensors[name]).detach(), offsets)
            for name, offsets in self.planned[names].items()
        }

    def _plan(self, tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Return the offsets of what this rank writes, by name."""
        from torch.distributed.checkpoint import DefaultSavePlanner

        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(tensors), is_coordinator=self.mesh.is_main)
        plans, _ = planner.create_global_plan(self.mesh.all_gather_objects(planner.create_local_plan()))
        items = plans[self.mesh.rank].items
        offsets = {item.index.fqn: tuple(item.index.offset or ()) for item in items}
        return {name: own for name, own in offsets.items() if local_tensor(tensors[name]).numel()}


def write_chunks(folder: Path, chunks: StateChunks, rank: int, ranks: int) -> list[Path]:
    """Write this rank's chunks into ``folder``, one file for each part of the state.

    Returns:
        The files that were written.

    Raises:
        OSError, SafetensorError: if a file cannot be written.
    """
    from safetensors.torch import save_file

    files = []
    for part, named in chunks.items():
        if rank and not named:
            continue
        number = "" if ranks == 1 else f"-{rank + 1:05d}-of-{ranks:05d}"
        files.append(folder / part / f"{STEMS[Path(part).name]}{number}.safetensors")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        placement = {name: {"saved_offsets": chunk.offsets} for name, chunk in named.items()}
        tensors = {name: chunk.tensor.cpu().contiguous() for name, chunk in named.items()}
        save_file(tensors, files[-1], metadata={"format": "pt", PLACEMENT: json.dumps(placement)})
        apply_umask(files[-1])
    return files


class StoredTensor(NamedTuple):
    """A full tensor in files."""

    shape: torch.Size
    dtype: torch.dtype


class StoredTensors:
    """The tensors in the safetensors files of one folder, such as ``checkpoint/ema``; reads no pickle.

    Args:
        rename: from a name in the files to the tensor's name now.

    Raises:
        UserError: here and from every method, if a file cannot be read or the chunks do not fit together.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str] = lambda name: name) -> None:
        self.folder = folder
        with self._reading():
            self._reader, self._metadata = self._open()
        self._stored_names = {rename(name): name for name in _tensors(self._metadata)}

    def _open(self) -> "tuple[HuggingFaceStorageReader, Metadata]":
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        if not any(self.folder.glob("*.safetensors")):
            raise ValueError("it has no .safetensors file")
        reader = HuggingFaceStorageReader(str(self.folder))
        metadata = reader.read_metadata()
        for name, stored in _tensors(metadata).items():
            volume = sum(chunk.sizes.numel() for chunk in stored.chunks)
            valid = all(
                len(c.offsets) == len(c.sizes) and min(c.offsets, default=0) >= 0 for c in stored.chunks
            )
            if not valid or volume != stored.size.numel():
                raise ValueError(f"the chunks of {name} do not make up a full tensor")
        return reader, metadata

    def tensors(self) -> "dict[str, StoredTensor]":
        """Return shape and dtype of the full tensors, by name."""
        stored = _tensors(self._metadata)
        return {
            name: StoredTensor(stored[there].size, stored[there].properties.dtype)
            for name, there in self._stored_names.items()
        }

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors in place, full or this rank's shards; their names and shapes must be the stored ones."""
        stored = {name: found.shape for name, found in self.tensors().items()}
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        odd = [name for name in {**shapes, **stored} if shapes.get(name) != stored.get(name)]
        if odd:
            there, here = (list(sizes[odd[0]]) if odd[0] in sizes else "absent" for sizes in (stored, shapes))
            raise UserError(
                f"{self.folder} is not of this model: {len(odd)} tensors differ, such as {odd[0]}, {there} there and "
                f"{here} here. Use another checkpoint."
            )
        self._read({self._stored_names[name]: tensor for name, tensor in tensors.items()})

    def each(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and full tensor of each, read one after the other: they are not in memory together."""
        for name, found in self.tensors().items():
            tensor = torch.empty(found.shape, dtype=found.dtype)
            self._read({self._stored_names[name]: tensor})
            yield name, tensor

    def _read(self, by_stored_name: dict[str, Tensor]) -> None:
        from torch.distributed.checkpoint import DefaultLoadPlanner

        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with self._reading():
            planner.set_up_planner(by_stored_name, self._metadata, is_coordinator=True)
            plan = planner.create_local_plan()
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            self._reader.read_data(self._reader.prepare_local_plan(plan), planner).wait()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn whatever a damaged file raises into UserError."""
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.folder} cannot be read ({type(error).__name__}: {error}): use another checkpoint."
            ) from error


def _tensors(metadata: "Metadata") -> "dict[str, TensorStorageMetadata]":
    return metadata.state_dict_metadata  # type: ignore[return-value]  # the reader puts nothing else there
