"""A flipped bit in a file that a reader trusts is detected; in any other file it changes nothing that is read."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

import train
from stdit.checkpoint_files import verify
from stdit.codecs import build_text_encoder
from stdit.codecs.base import VideoCodec
from stdit.codecs.config import TextEncoderConfig
from stdit.codecs.stored_text import StoredTextEncoder, store_text
from stdit.codecs.text import TextEncoder
from stdit.data.cache.maintenance import verify_cache
from stdit.data.cache.shards import EntryKind, read_shard
from stdit.data.cache.store import CacheStore
from stdit.data.manifest import index as manifest_index
from stdit.data.manifest.reading import read_manifest, read_texts
from stdit.diffusion.scheduler import RectifiedFlow
from stdit.errors import UserError
from stdit.models.stdit import STDiT
from stdit.parallel.processes.mesh import Mesh
from stdit.pipelines.loading import load_pipeline
from stdit.pipelines.pipeline import STDiTPipeline
from stdit.pipelines.sources import find_checkpoint_source
from stdit.training.checkpoint_writer import CheckpointWriter
from stdit.training.config import CheckpointConfig, parse_train
from stdit.training.run_folder import lock_run_folder
from stdit.training.tracking import MetricsFile
from tests.training.tiny import tiny_settings

FLIPS = 8
"""Bits of each file that the quick test flips."""
WEIGHT_FLIPS = 500
"""Bits of each file of tensors that the slow test flips; of all others it flips all."""
STEPS = 2


class Folder:
    """A small run with all that it reads and writes: text states, a cache, a fitted codec, an index of its clips."""

    def __init__(self, root: Path) -> None:
        self.root, self.run = root, root / "outputs" / "tiny"
        self.text, self.cache = root / "text", root / "cache"
        settings = tiny_settings(root)
        self.manifest = root / "clips" / "manifest.csv"
        self.captions = ["", *read_texts(self.manifest)]
        encoder = build_text_encoder(TextEncoderConfig(name="auto", path=str(root / "bert"), max_length=12))
        assert sum(store_text(encoder, self.captions, self.text)) > 1
        self.argv = [
            *settings,
            *("--codec.name", "pca", "--codec.stride", "[2, 4, 4]", "--codec.channels", "4"),
            *("--text_encoder", f"{{name: stored, path: {self.text}}}"),
            *("--data.cache", "disk", "--data.cache_dir", str(self.cache), "--model.patch_size", "[1, 1, 1]"),
            *("--checkpoint", "{every: 1, keep_last: 1, keep_best: 1}", "--validation.loss_every", "1"),
        ]
        self.config = parse_train(self.argv)
        self.train(STEPS)
        self.checkpoint = self.run / "checkpoints" / f"step-{STEPS:08d}"
        self.lines = (self.run / "metrics.jsonl").read_bytes()

    def train(self, steps: int) -> None:
        AcceleratorState._reset_state(True)
        assert train.train(parse_train([*self.argv, "--trainer.steps", str(steps)])) == 0

    def files(self) -> list[Path]:
        """Return the files of the run, the cache and the text states, without those of other checkpoints."""
        found = [path for part in (self.run, self.text, self.cache) for path in sorted(part.rglob("*"))]
        older = [path for path in self.run.glob("checkpoints/step-*") if path != self.checkpoint]
        return [
            path for path in found if path.is_file() and not any(path.is_relative_to(step) for step in older)
        ]

    def name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()


def small_pipeline_files(it: Folder, file: Path) -> None:
    find_checkpoint_source(it.run / "pipeline")
    find_checkpoint_source(it.run)


def pipeline(it: Folder, file: Path) -> None:
    STDiTPipeline.from_pretrained(it.run / "pipeline")


def losses(it: Folder, file: Path) -> dict[int, float]:
    return CheckpointWriter(it.run / "checkpoints", CheckpointConfig(), Mesh()).losses


def text_states(it: Folder, file: Path) -> list[bytes]:
    states = StoredTextEncoder(it.text).encode(it.captions)
    return [tensor.numpy().tobytes() for tensor in states]


def cache(it: Folder, file: Path) -> None:
    """Raise UserError if a shard or fitted codec is named as broken, as entries are that are encoded again."""
    if broken := verify_cache(it.cache).broken:
        raise UserError(str(broken))


def clips(it: Folder, file: Path) -> list[Any]:
    """Return the clips of the manifest: those of the index, or, if that is damaged, read again."""
    found, _ = read_manifest(it.manifest, index=file)
    return [(clip.media.name, clip.text, clip.num_frames, clip.fps) for clip in found]


def metrics(it: Folder, file: Path) -> int:
    """Cut the lines that a resume repeats; of the rest, return how many are not as they were: the damaged one."""
    damaged = file.read_bytes()
    try:
        MetricsFile(file, STEPS).close()
        lines = file.read_bytes().splitlines()
        assert all(line in damaged.splitlines() for line in lines)
        assert len(it.lines.splitlines()) - sum(line in it.lines.splitlines() for line in lines) <= 2
    finally:
        file.write_bytes(damaged)
    return 0


def resume(it: Folder, file: Path) -> Any:
    with lock_run_folder(it.config) as found:
        return found


Reader = Callable[[Folder, Path], Any]
TRUSTED: dict[str, Reader] = {
    "outputs/tiny/checkpoints/step-*": lambda it, file: verify(it.checkpoint),
    "outputs/tiny/checkpoints/validation_loss.json": losses,
    "outputs/tiny/codec/*": lambda it, file: VideoCodec.from_pretrained(file.parent),
    "outputs/tiny/pipeline/*.json": small_pipeline_files,
    "outputs/tiny/pipeline/meta.json": pipeline,
    "outputs/tiny/pipeline/model_index.json": pipeline,
    "outputs/tiny/pipeline/*.safetensors": pipeline,
    "outputs/tiny/pipeline/transformer/*": lambda it, file: STDiT.from_pretrained(file.parent),
    "outputs/tiny/pipeline/scheduler/*": lambda it, file: RectifiedFlow.from_pretrained(file.parent),
    "outputs/tiny/pipeline/vae/*": lambda it, file: VideoCodec.from_pretrained(file.parent),
    "outputs/tiny/pipeline/text_encoder/*": lambda it, file: TextEncoder.from_pretrained(file.parent),
    "text/*": text_states,
    "cache/*": cache,
    "cache/codecs/*": lambda it, file: VideoCodec.from_pretrained(file.parent),
}
"""What reads the files of a name: each must raise UserError when a bit has been flipped."""
HARMLESS: dict[str, tuple[str, Reader]] = {
    "outputs/tiny/config.yaml": ("written for people, and read by nothing", resume),
    "outputs/tiny/.lock": ("its text is only shown in a message", resume),
    "outputs/tiny/metrics.jsonl": (
        "lines are kept or cut by their step, nothing is computed of them",
        metrics,
    ),
    "outputs/tiny/clips/*": ("a damaged index is ignored, and the manifest is read again", clips),
}
"""What reads other files, and why a flipped bit does no harm: the result is the same."""


def readers(name: str) -> list[Reader]:
    return [read for pattern, read in TRUSTED.items() if fnmatch(name, pattern)]


def harmless(name: str) -> list[Reader]:
    return [read for pattern, (_, read) in HARMLESS.items() if fnmatch(name, pattern)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest_index, "MIN_ROWS", 1)  # so that there is an index
        yield Folder(tmp_path_factory.mktemp("flipped"))


def flipped(file: Path, bits: list[int]) -> Iterator[int]:
    """Flip one bit of a file after the other, and restore it."""
    content = file.read_bytes()
    try:
        for bit in bits:
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            yield bit
    finally:
        file.write_bytes(content)


def check(it: Folder, file: Path, bits: list[int]) -> None:
    name, known = it.name(file), harmless(it.name(file))
    assert bool(known) != bool(readers(name)), f"{name}: say what reads it"
    expected = [read(it, file) for read in known]
    for read in readers(name):
        read(it, file)
    for bit in flipped(file, bits):
        for read, before in zip(known, expected, strict=True):
            assert read(it, file) == before, f"{name}: bit {bit} changes what is read"
        for read in readers(name):
            with pytest.raises(UserError):
                read(it, file)
                print(f"{name}: bit {bit} is not noticed")


def test_a_flipped_bit_is_detected_or_harmless(folder: Folder) -> None:
    names = {folder.name(file) for file in folder.files()}
    for pattern in (*TRUSTED, *HARMLESS):
        assert any(fnmatch(name, pattern) for name in names), f"the run has no {pattern}"
    for file in folder.files():
        chosen = random.Random(f"0/{folder.name(file)}")
        check(folder, file, [chosen.randrange(8 * file.stat().st_size) for _ in range(FLIPS)])


@pytest.mark.slow
def test_every_flipped_bit_is_detected_or_harmless(folder: Folder) -> None:
    for file in folder.files():
        bits = range(8 * file.stat().st_size)
        tensors = file.suffix == ".safetensors"
        check(folder, file, random.Random(0).sample(bits, WEIGHT_FLIPS) if tensors else list(bits))


def test_a_flipped_bit_never_gives_another_cached_value(folder: Folder) -> None:
    def entries() -> Iterator[bytes | None]:
        store = CacheStore(folder.cache)
        for kind, key in keys:
            value = store.get(kind, key)
            yield None if value is None else value.numpy().tobytes() + str(value.shape).encode()

    shards = [file for file in folder.cache.glob("*.safetensors")]
    keys: list[tuple[EntryKind, bytes]] = [
        (shard.kind, key.tobytes())  # type: ignore[misc]
        for shard in map(read_shard, shards)
        for key in shard.keys
    ]
    expected = list(entries())
    assert {kind for kind, _ in keys} == {"latents", "texts", "contents"} and None not in expected
    for file in shards:
        chosen = random.Random(0)
        for bit in flipped(file, [chosen.randrange(8 * file.stat().st_size) for _ in range(64)]):
            for found, before in zip(entries(), expected, strict=True):
                assert found in (None, before), bit  # None: it is encoded again


@contextmanager
def opened(root: Path) -> Iterator[set[Path]]:
    """Collect the files below a folder that Python opens to read."""
    found: set[Path] = set()
    active = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and active and isinstance(arguments[0], str | Path):
            mode = arguments[1] or ""
            if not set(mode) & set("wax") and Path(arguments[0]).is_relative_to(root):
                found.add(Path(arguments[0]))

    sys.addaudithook(hook)
    try:
        yield found
    finally:
        active.clear()


def test_the_files_that_a_run_opens_are_those_of_the_lists(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest_index, "MIN_ROWS", 1)
        it = Folder(tmp_path)
        with opened(tmp_path) as found:
            it.train(STEPS + 1)  # resumes
            load_pipeline(it.run)
            load_pipeline(it.run / "checkpoints" / f"step-{STEPS + 1:08d}")
    ours = {it.name(file) for file in found if file.is_file() and not file.is_relative_to(tmp_path / "clips")}
    ours = {name for name in ours if name.startswith(("outputs/tiny/", "text/", "cache/"))}
    assert {"outputs/tiny/metrics.jsonl", "text/text_states.json"} <= ours
    assert not {name for name in ours if not readers(name) and not harmless(name)}
    assert "outputs/tiny/config.yaml" not in ours


def test_a_damaged_pipeline_is_exported_again_by_a_run_that_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    it = Folder(tmp_path)
    index = it.run / "pipeline" / "model_index.json"
    expected = index.read_bytes()
    index.write_bytes(expected.replace(b'"step": 2', b'"step": 3'))
    with pytest.raises(UserError, match="model_index.json has changed since it was written"):
        load_pipeline(it.run)
    it.train(STEPS)
    assert "model_index.json has changed" in capsys.readouterr().out
    assert index.read_bytes() == expected and load_pipeline(it.run)[0].config["step"] == STEPS
