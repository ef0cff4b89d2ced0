"""Tensors on disk, written by all ranks, and read by any other number of them.

Who writes which part of what, and who reads which part of whose file, is planned by torch.distributed.checkpoint.
Its own files are read by pickle, which runs what they tell it to; these are safetensors, as HuggingFaceStorageReader
reads them: their headers say where in the whole tensor a part belongs. On one rank they are plain safetensors.

PyTorch's part of it is imported where it is used: it takes time, and settings are read without it.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stdit.checkpoint_files import share
from stdit.errors import UserError
from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.processes.parameters import local_tensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

STEMS = {"model": "diffusion_pytorch_model", "ema": "ema", "optimizer": "optimizer"}
"""Names of the files in the folder of each part of a state; the model's is the name that diffusers looks for."""
PLACEMENT = "DCP_SHARDING_INFO"
"""Under which the header of a file has, as torch's reader wants it, where its tensors begin in whole ones."""

StateDicts = Mapping[str, Mapping[str, Tensor]]
"""By part (model, ema, optimizer), tensors by name; whole on every rank, or a share on each (DTensor)."""


@dataclass(frozen=True)
class TensorChunk:
    """What one rank writes of a tensor."""

    tensor: Tensor
    offsets: tuple[int, ...]
    """Where it begins in the whole tensor."""


StateChunks = dict[str, dict[str, TensorChunk]]
"""By part and name."""


@dataclass
class SavePlan:
    """Which rank writes what: each its share of what is sharded; of what all have, each a part, once."""

    mesh: Mesh
    planned: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = field(default_factory=dict)
    """By names of all tensors, the offsets of those that this rank writes: they change only while state appears."""

    def chunks(self, state: StateDicts) -> StateChunks:
        """What this rank writes of ``state``, not copied; every rank must call this."""
        return {part: self._chunks(dict(tensors)) for part, tensors in state.items()}

    def _chunks(self, tensors: dict[str, Tensor]) -> dict[str, TensorChunk]:
        key = tuple(tensors)
        if key not in self.planned:
            self.planned[key] = self._plan(tensors)
        return {
            name: TensorChunk(local_tensor(tensors[name]).detach(), at)
            for name, at in self.planned[key].items()
        }

    def _plan(self, tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        from torch.distributed.checkpoint import DefaultSavePlanner

        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(tensors), is_coordinator=self.mesh.is_main)
        plans, _ = planner.create_global_plan(self.mesh.all_gather_objects(planner.create_local_plan()))
        items = plans[self.mesh.rank].items
        mine = {item.index.fqn: tuple(item.index.offset or ()) for item in items}
        return {name: at for name, at in mine.items() if local_tensor(tensors[name]).numel()}


def write_chunks(folder: Path, pieces: StateChunks, rank: int, ranks: int) -> list[Path]:
    """Write this rank's files, one for each part of which it has pieces, into the folders of the parts.

    Returns:
        The files.

    Raises:
        OSError, SafetensorError: what the disk refuses.
    """
    from safetensors.torch import save_file

    files = []
    for part, named in pieces.items():
        if rank and not named:
            continue
        number = "" if ranks == 1 else f"-{rank + 1:05d}-of-{ranks:05d}"
        files.append(folder / part / f"{STEMS[part]}{number}.safetensors")
        files[-1].parent.mkdir(exist_ok=True)
        placement = {name: {"saved_offsets": piece.offsets} for name, piece in named.items()}
        tensors = {name: piece.tensor.cpu().contiguous() for name, piece in named.items()}
        save_file(tensors, files[-1], metadata={"format": "pt", PLACEMENT: json.dumps(placement)})
        share(files[-1])
    return files


class StoredTensors:
    """The tensors in the files of one folder, such as ``checkpoint/ema``. Files of safetensors only; no pickle.

    Raises:
        UserError: from every method, and when made: for what cannot be read, or does not fit together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with self._reading():
            self._reader, self._metadata = self._open()

    def _open(self) -> "tuple[HuggingFaceStorageReader, Metadata]":
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        if not any(self.folder.glob("*.safetensors")):
            raise ValueError("it has no .safetensors file")
        reader = HuggingFaceStorageReader(str(self.folder))
        metadata = reader.read_metadata()
        for name, found in _tensors(metadata).items():
            volume = sum(chunk.sizes.numel() for chunk in found.chunks)
            placed = all(
                len(c.offsets) == len(c.sizes) and min(c.offsets, default=0) >= 0 for c in found.chunks
            )
            if not placed or volume != found.size.numel():
                raise ValueError(f"the parts of {name} do not make up a whole")
        return reader, metadata

    def shapes(self) -> dict[str, torch.Size]:
        """Of the whole tensors, by name."""
        return {name: found.size for name, found in _tensors(self._metadata).items()}

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors, whole or this rank's shares of them, in place; names and shapes must be the stored ones."""
        from torch.distributed.checkpoint import DefaultLoadPlanner

        stored = self.shapes()
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        odd = [name for name in {**shapes, **stored} if shapes.get(name) != stored.get(name)]
        if odd:
            there, here = (list(sizes[odd[0]]) if odd[0] in sizes else "absent" for sizes in (stored, shapes))
            raise UserError(
                f"{self.folder} is not of this model: {len(odd)} tensors differ, such as {odd[0]}, {there} there and "
                f"{here} here. Use another checkpoint."
            )
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with self._reading():
            planner.set_up_planner(dict(tensors), self._metadata, is_coordinator=True)
            plan = planner.create_local_plan()
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            self._reader.read_data(self._reader.prepare_local_plan(plan), planner).wait()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.folder} cannot be read ({type(error).__name__}: {error}): use another checkpoint."
            ) from error


def _tensors(metadata: "Metadata") -> "dict[str, TensorStorageMetadata]":
    return metadata.state_dict_metadata  # type: ignore[return-value]  # the reader puts nothing else there
