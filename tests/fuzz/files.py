"""The readers of files that programs write: checkpoints, weights, states, pipelines, caches, videos and pictures."""

import copy
import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import torch
import xxhash
from hypothesis import strategies as st
from safetensors.torch import save

from stdit.checkpoint_files import FORMAT, newest_whole, verify
from stdit.codecs.stored_text import StoredTextEncoder, store_text
from stdit.codecs.text import TextEncoder
from stdit.data.cache.maintenance import prune_cache, verify_cache
from stdit.data.cache.shards import CacheEntry, write_shard
from stdit.data.config import DataConfig
from stdit.data.decoding.decode import DecodeError, decode_clip, probe
from stdit.errors import UserError
from stdit.hashing import read_sealed, sealed_json
from stdit.lora.adapters import adapter_settings, adapter_weights, add_adapter, load_adapter
from stdit.lora.config import LoRAConfig, parse_lora
from stdit.lora.files import check_fits, read_adapter
from stdit.lora.header import SETTINGS
from stdit.lora.names import to_other_names
from stdit.models.stdit import STDiT
from stdit.pipelines.config import PIPELINE_DEFAULTS
from stdit.pipelines.loading import load_codec, model_settings, pipeline_settings
from stdit.pipelines.requests import Request, check_requests
from stdit.pipelines.sources import find_checkpoint_source, pipeline_step
from stdit.pipelines.video_io import write_gif, write_mp4
from stdit.pipelines.weights import load_transformer
from stdit.training.checkpoint import find_checkpoint
from stdit.training.config import TrainConfig
from stdit.training.experiment import experiment_key
from stdit.training.lineage import check_can_resume
from tests.fuzz.inputs import as_json, changed_bytes, changed_safetensors, changed_tree


@dataclass(frozen=True)
class Reader:
    """A function that reads, and the strategy of its inputs."""

    inputs: st.SearchStrategy[Any]
    read: Callable[[Any, Path], object]
    """Takes an input, and an empty folder that it may write to."""
    cost: int = 1
    """How many times longer an input takes than one of the quick readers, about."""


def checkpoint_meta_reader() -> Reader:
    """``meta.json`` of a checkpoint, with files that match it or not."""
    experiment = experiment_key(TrainConfig(data=DataConfig(manifest="clips")))
    files = {"model/config.json": b"{}", "ema/ema.safetensors": b"abcd"}
    listed = {name: {"bytes": len(data), "hash": _hash(data)} for name, data in files.items()}
    meta = {
        "step": 8,
        "experiment": experiment,
        "nonfinite_in_a_row": 0,
        "batch_splits": 1,
        "format": FORMAT,
        "pipeline": {"fps": 8},
        "files": listed,
    }
    outside = {**meta, "files": {"../../../x": {"bytes": 1, "hash": "xxh3:2"}, **listed}}

    def read(data: bytes, folder: Path) -> None:
        checkpoints = folder / "checkpoints"
        step = checkpoints / "step-00000008"
        for name, content in files.items():
            (step / name).parent.mkdir(parents=True, exist_ok=True)
            (step / name).write_bytes(content)
        (step / "meta.json").write_bytes(_resealed(data))
        newest_whole(checkpoints)
        uses: tuple[Callable[[], object], ...] = (
            lambda: verify(step),
            lambda: check_can_resume(step, experiment),
            lambda: find_checkpoint("auto", checkpoints),
            lambda: find_checkpoint_source(folder),
            lambda: pipeline_settings(find_checkpoint_source(step)),
        )
        for use in uses:
            with suppress(UserError):  # so that the next has its turn
                use()

    return Reader(as_json(changed_tree([meta, outside])), read)


def _resealed(data: bytes) -> bytes:
    """Give changed JSON a right hash of itself, so that what follows the check of it has its turn."""
    with suppress(ValueError, TypeError, RecursionError):
        return sealed_json(json.loads(data)).encode()
    return data


def _hash(data: bytes) -> str:
    return f"xxh3:{xxhash.xxh3_128(data).hexdigest()}"


def weights_reader() -> Reader:
    """Averaged weights of a checkpoint."""
    model = STDiT(depth=1, hidden_size=8, num_heads=1, in_channels=1, caption_channels=4, model_max_length=2)
    settings, weights = json.dumps(dict(model.config)), save(model.state_dict())

    def read(data: bytes, folder: Path) -> object:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(settings)
        (folder / "ema").mkdir()
        (folder / "ema" / "ema.safetensors").write_bytes(data)
        return load_transformer(
            folder, {"files": {"ema/ema.safetensors": {}, "model/config.json": {}}}, ema=True
        )

    return Reader(changed_safetensors(weights), read, cost=20)


def adapter_reader() -> Reader:
    """Adapters: changed files, and changed settings in the header."""
    base = STDiT(depth=1, hidden_size=8, num_heads=1, in_channels=1, caption_channels=4, model_max_length=2)
    model = copy.deepcopy(base)
    add_adapter(model, LoRAConfig(rank=2))
    weights, settings = adapter_weights(model), adapter_settings(model)
    kohya = save(to_other_names(weights, settings, "kohya"))

    def with_settings(text: bytes) -> bytes:
        return save(weights, {SETTINGS: text.decode(errors="replace")})

    def read(data: bytes, folder: Path) -> None:
        (folder / "a.safetensors").write_bytes(data)
        file = parse_lora(str(folder / "a.safetensors")).file
        check_fits(file, base)
        adapter = read_adapter(file)
        load_adapter(copy.deepcopy(base), adapter.weights, adapter.settings, "a")

    files = changed_safetensors(with_settings(json.dumps(settings).encode())) | changed_safetensors(kohya)
    return Reader(files | as_json(changed_tree([settings])).map(with_settings), read, cost=20)


class _Ones(TextEncoder):
    """Two tokens for each caption."""

    name, channels, max_length = "ones", 4, 8

    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(len(texts), 2, self.channels), torch.ones(len(texts), 2, dtype=torch.bool)


def text_states_reader() -> Reader:
    """A folder of stored text states."""
    with tempfile.TemporaryDirectory() as name:
        list(store_text(_Ones(), ["a", "b"], Path(name)))
        file = next(Path(name).glob("*.safetensors")).read_bytes()
        facts = read_sealed(Path(name) / "text_states.json")

    def read(inputs: tuple[bytes, bytes], folder: Path) -> object:
        (folder / "text_states.json").write_bytes(_resealed(inputs[0]))
        (folder / "states-00000.safetensors").write_bytes(inputs[1])
        return StoredTextEncoder(folder).encode(["a", "b"])

    headers = st.one_of(st.just(json.dumps(facts).encode()), as_json(changed_tree([facts])))
    return Reader(st.tuples(headers, st.one_of(changed_safetensors(file), st.just(file))), read)


def media_reader() -> Reader:
    """Videos and pictures with changed bytes, probed and decoded as clips are."""
    frames = np.zeros((3, 16, 16, 3), np.uint8)
    valid = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_mp4(folder / "a.mp4", frames, fps=8, metadata={})
        write_gif(folder / "a.gif", frames, fps=8, metadata={})
        write_webm(folder / "a.webm", frames)
        for suffix in ("png", "jpg", "webp", "bmp"):
            PIL.Image.fromarray(frames[0]).save(folder / f"a.{suffix}")
        valid = [path.read_bytes() for path in sorted(folder.iterdir())]

    def read(data: bytes, folder: Path) -> None:
        (folder / "a.mp4").write_bytes(data)
        try:
            info = probe(folder / "a.mp4")
            decode_clip(folder / "a.mp4", min(info.num_frames, 2), min(info.fps, 100.0), 8, 8)
        except DecodeError as error:
            raise UserError(str(error)) from error

    return Reader(changed_bytes(valid), read, cost=2)


def write_webm(path: Path, frames: np.ndarray) -> None:
    """Write a video in Matroska, whose header has another form than that of MP4."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=8, width=16, height=16, pix_fmt="yuv420p")
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def pipeline_folder_reader() -> Reader:
    """The small files of an exported pipeline."""
    config = dict(STDiT(depth=1, hidden_size=8, num_heads=1, in_channels=3, caption_channels=4).config)
    index = {"_class_name": "STDiTPipeline", **PIPELINE_DEFAULTS, "step": 8}

    def read(inputs: tuple[bytes, bytes, bytes], folder: Path) -> None:
        names = ("model_index.json", "transformer/config.json", "codec/codec.json")
        for name, data in zip(names, inputs, strict=True):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        uses: tuple[Callable[[], object], ...] = (
            lambda: pipeline_settings(find_checkpoint_source(folder)),
            lambda: model_settings(find_checkpoint_source(folder)),
            lambda: pipeline_step(folder),
            lambda: load_codec(find_checkpoint_source(folder)),
            lambda: check_requests([Request("a", 0)], pipeline_settings(find_checkpoint_source(folder))),
        )
        for use in uses:
            with suppress(UserError):
                use()

    return Reader(
        st.tuples(*(as_json(changed_tree([tree])) for tree in (index, config, {"name": "pixel"}))),
        read,
        cost=2,
    )


def cache_reader() -> Reader:
    """A cache with a changed shard and a changed codec."""
    entries = [CacheEntry("latents", "maker", bytes([k]) * 16, torch.zeros(k, 4)) for k in (1, 2)]
    with tempfile.TemporaryDirectory() as name:
        write_shard(Path(name) / "a.safetensors", entries)
        shard = (Path(name) / "a.safetensors").read_bytes()

    def read(inputs: tuple[bytes, bytes], folder: Path) -> object:
        (folder / "0.safetensors").write_bytes(inputs[0])
        (folder / "codecs" / "x").mkdir(parents=True)
        (folder / "codecs" / "x" / "codec.json").write_bytes(inputs[1])
        return verify_cache(folder), prune_cache(folder, dry_run=True)

    codec = as_json(changed_tree([{"name": "pca", "channels": 4}]))
    return Reader(
        st.tuples(st.one_of(changed_safetensors(shard), changed_bytes([shard])), codec), read, cost=2
    )
