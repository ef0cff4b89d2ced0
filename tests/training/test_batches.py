"""Training from the cache: the same batches, without videos and without encoders."""

import gc
import json
from pathlib import Path

import av
import pytest
import torch
from transformers import PreTrainedModel

from stdit.data.cache.maintenance import verify_cache
from stdit.data.cache.store import CacheStore
from stdit.data.config import DataConfig, SourceConfig
from stdit.errors import UserError
from stdit.parallel.processes.mesh import Mesh
from stdit.pipelines.loading import load_pipeline
from stdit.training import build
from stdit.training.batches import build_batches
from stdit.training.caching import fill_cache, prune_unused
from stdit.training.config import parse_train
from stdit.training.trainer import Trainer
from tests.codecs.tiny import save_tiny_vae
from tests.parallel.ranks import run_on_ranks
from tests.test_train import do, metrics, numbers
from tests.training.tiny import save_clips, tiny_settings


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: with several, sums are rounded in varying order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def settings(tmp_path):
    base = tiny_settings(tmp_path)
    return lambda **flags: [
        *base, *(part for key, value in flags.items() for part in (f"--{key.replace('__', '.')}", str(value)))
    ]  # fmt: skip


@pytest.fixture
def views(settings, tmp_path):
    """Settings of a run on views of longer clips, on the latents of a small VAE, that makes samples, too."""
    save_clips(tmp_path / "clips", frames=6)
    captions = ["a red square", "a cat to the right"]
    rows = [f"clip-{n}.mp4,{captions[n % 2]},6,8,8,8" for n in range(5)]
    (tmp_path / "clips" / "manifest.csv").write_text(
        "\n".join(["path,text,num_frames,fps,height,width", *rows])
    )
    flags = {
        "codec__name": "AutoencoderKL", "codec__path": save_tiny_vae("AutoencoderKL", tmp_path / "vae"),
        "model__patch_size": "[1, 1, 1]", "flow__conditioning": "{}",
        "data__augmented_views": 2, "data__flip": "true",
        "validation__prompts": '["a red square"]', "validation__num_inference_steps": 1, "trainer__steps": 3,
    }  # fmt: skip
    return lambda **more: settings(**(flags | more))


class UsageCounter:
    """Counts videos that are opened to be read, and networks that are alive while a step is done."""

    def __init__(self, monkeypatch):
        self.opened, self.encoders = [], []
        others = {id(thing) for thing in gc.get_objects() if is_encoder(type(thing))}  # of other tests
        open_video, step = av.open, Trainer.step

        def opening(file, mode=None, *args, **options):
            self.opened += [str(file)] * (mode != "w")
            return open_video(file, mode, *args, **options)

        def stepping(trainer, batch):
            if batch.step == 2:
                gc.collect()
                alive = [thing for thing in gc.get_objects() if is_encoder(type(thing))]
                self.encoders = [type(thing) for thing in alive if id(thing) not in others]
            return step(trainer, batch)

        monkeypatch.setattr(av, "open", opening)
        monkeypatch.setattr(Trainer, "step", stepping)


def is_encoder(kind):
    return issubclass(kind, PreTrainedModel) or kind.__name__ == "Encoder"  # of text, of a VAE


@pytest.mark.slow
def test_a_run_is_the_same_with_every_cache(views, tmp_path, monkeypatch):
    outputs, other = tmp_path / "outputs", {"data__cache_dir": tmp_path / "other"}
    with monkeypatch.context() as patch:
        counter = UsageCounter(patch)
        assert do(views(name="memory", data__cache="memory", **other)) == 0
        assert counter.opened and not counter.encoders
    with monkeypatch.context() as patch:
        counter = UsageCounter(patch)
        assert do(views(name="disk", data__cache="disk")) == 0
        assert counter.opened and len(counter.encoders) == 2
    summary = fill_cache(parse_train(views(data__cache="memory")))
    assert (summary.clips, summary.captions) == (5, 2) and summary.encoded + summary.stored == 3 * 4 + 2 * 2
    assert summary.stored > 0 and summary.captions_encoded == 0
    with monkeypatch.context() as patch:
        counter = UsageCounter(patch)
        assert do(views(name="encoded", data__cache="disk")) == 0
        assert not counter.opened and not counter.encoders
    memory, disk, encoded = (outputs / name for name in ("memory", "disk", "encoded"))
    assert numbers(memory) == numbers(disk) == numbers(encoded)
    assert len({line["loss"] for line in metrics(memory)}) == 3

    pipe, whole = load_pipeline(encoded)[0], load_pipeline(memory)[0]  # the former made without encoders
    assert pipe.codec.fingerprint() == whole.codec.fingerprint()
    texts = ["some words"]
    assert torch.equal(pipe.prompt_encoder.encode(texts)[0], whole.prompt_encoder.encode(texts)[0])
    samples = [run / "samples" / "step-00000003" / "00-a-red-square.mp4" for run in (memory, encoded)]
    assert samples[0].read_bytes() == samples[1].read_bytes()

    assert (
        do(views(name="disk", data__cache="memory", trainer__steps=5)) == 0
    )  # between parts of a run it may change
    assert do(views(name="memory", data__cache="disk", trainer__steps=5, **other)) == 0
    assert numbers(memory) == numbers(disk) and len(numbers(disk)) == 5


def test_pruning_keeps_what_runs_read(views, tmp_path):
    folder = tmp_path / "clips" / "stdit-cache"
    config, plain = (parse_train(views(data__cache="disk", data__flip=flip)) for flip in ("true", "false"))
    fill_cache(config)
    entries = verify_cache(folder).entries
    assert prune_unused(folder, [plain, config]).entries == 0
    assert prune_unused(folder, [plain], dry_run=True).entries == 3 * 2
    assert prune_unused(folder, [plain]).entries == 3 * 2
    assert verify_cache(folder).entries == entries - 6 and not verify_cache(folder).broken
    assert fill_cache(plain).encoded == 0


@pytest.mark.parametrize(
    "cache", [*(pytest.param(cache, marks=pytest.mark.slow) for cache in ("none", "disk")), "memory"]
)
def test_clips_that_fail_are_listed_once_with_the_step_across_parts_of_a_run(
    settings,
    tmp_path,
    cache,
    monkeypatch,
):
    argv, folder, clip = (
        settings(data__cache=cache, name=cache),
        tmp_path / "outputs" / cache,
        tmp_path / "clips/clip-3.mp4",
    )
    whole, build_plan = clip.read_bytes(), build.build_plan

    def build_and_break(*args):
        plan = build_plan(*args)
        clip.write_bytes(b"damaged")
        return plan

    monkeypatch.setattr(build, "build_plan", build_and_break)
    assert do([*argv, "--trainer.steps", "4"]) == 0
    clip.write_bytes(whole)
    assert do([*argv, "--trainer.steps", "6"]) == 0
    (line,) = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert line["path"] == str(clip) and "not a readable video" in line["reason"]
    assert (line["step"] is None) if cache == "memory" else (0 <= line["step"] < 4)
    lines = metrics(folder)
    assert len(lines) == 6 and sum(entry["replaced"] for entry in lines) > 0
    for entry in lines:
        total = entry["seconds"] + entry["data_seconds"]
        assert entry["data_share"] == pytest.approx(entry["data_seconds"] / total, abs=0.01)


def test_the_cache_is_beside_the_data_by_default(tmp_path):
    assert DataConfig(manifest="data/shapes/manifest.csv").cache_folder() == Path("data/shapes/stdit-cache")
    assert DataConfig(manifest=str(tmp_path)).cache_folder() == tmp_path / "stdit-cache"
    assert DataConfig(manifest=str(tmp_path), cache_dir="fast/cache").cache_folder() == Path("fast/cache")
    sources = [SourceConfig(str(tmp_path / "a.csv")), SourceConfig("s3://bucket/{0..9}.tar")]
    assert DataConfig(sources=sources).cache_folder() == tmp_path / "stdit-cache"
    with pytest.raises(UserError, match=r"s3://bucket/\{0..9\}.tar is no local folder: set data.cache_dir"):
        DataConfig(sources=sources[1:], cache="disk").validate()


@pytest.mark.slow
def test_ranks_encode_their_share_and_see_the_same_batches(views, tmp_path):
    expected = list(build_batches(parts_of(views(data__cache="memory")), tmp_path, Mesh())(0, 4))
    folders = {cache: tmp_path / f"ranks-{cache}" for cache in ("memory", "disk")}
    runs = [views(data__cache=cache, data__cache_dir=folder) for cache, folder in folders.items()]
    run_on_ranks(2, on_rank, runs, tmp_path, expected)
    stored = {cache: CacheStore(folder).count("latents").total() for cache, folder in folders.items()}
    assert stored["memory"] == 3 * 4 + 2 * 2 >= stored["disk"] > 4


def parts_of(argv):
    return build.build_components(parse_train(argv), None, 1, 1 << 40)


def on_rank(group, runs, folder, expected):
    mesh = Mesh(group.rank, group.size)
    for argv in runs:
        batches = build_batches(parts_of(argv), folder, mesh)(0, 4)
        for part, whole in zip(batches, expected, strict=True):
            (row,) = mesh.sample_range(2)
            assert torch.equal(part.latents, whole.latents[row : row + 1])
            states = whole.text_states[row][whole.text_mask[row]]
            torch.testing.assert_close(part.text_states[0], states, atol=1e-5, rtol=1e-5)
