import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import PushToHubMixin
from safetensors.torch import load_file, save_file

from stdit.checkpoint_files import verify, write_manifest
from stdit.errors import UserError
from stdit.pipelines.bundled import bundled_folder
from stdit.pipelines.config import check_recorded
from stdit.pipelines.loading import load_pipeline, pipeline_settings
from stdit.pipelines.pipeline import STDiTPipeline
from stdit.pipelines.sources import find_checkpoint_source
from tests.pipelines.tiny import tiny_model, tiny_pipeline, write_run


@pytest.fixture
def run(pipe, tmp_path):
    return write_run(tmp_path / "run", pipe, steps=(10, 20))


def weight(pipe):
    return pipe.transformer.final_layer.linear.weight


def test_a_run_gives_its_newest_checkpoint_with_averaged_weights(pipe, run):
    loaded, weights = load_pipeline(run)
    assert loaded.config["step"] == 20 and loaded.config["num_frames"] == 4
    assert torch.equal(weight(loaded), 2 * weight(pipe))
    own, own_hash = load_pipeline(run, ema=False)
    assert torch.equal(weight(own), weight(pipe))
    assert weights.startswith("xxh3:") and weights != own_hash


def test_a_checkpoint_by_name(run):
    loaded, _ = load_pipeline(run / "checkpoints" / "step-00000010")
    assert loaded.config["step"] == 10


def test_a_broken_checkpoint_is_skipped_in_a_run_and_refused_by_name(run, caplog):
    broken = run / "checkpoints" / "step-00000020"
    (broken / "ema" / "ema.safetensors").write_bytes(b"half")
    assert find_checkpoint_source(run).path.name == "step-00000010"
    assert "ema.safetensors" in caplog.text
    with pytest.raises(UserError, match="ema.safetensors has 4 bytes"):
        find_checkpoint_source(broken)
    assert find_checkpoint_source(broken, ema=False).path == broken


@pytest.mark.parametrize("step, chosen", [(5, "step-00000020"), (20, "pipeline"), (30, "pipeline")])
def test_the_newer_of_checkpoint_and_pipeline_is_used(pipe, run, step, chosen):
    pipe.save_pretrained(run / "pipeline")
    index = run / "pipeline" / "model_index.json"
    index.write_text(index.read_text().replace('"step": null', f'"step": {step}'))
    write_manifest(run / "pipeline", {})  # as if it had been written so
    source = find_checkpoint_source(run)
    assert source.path.name == chosen and source.run == run
    load_pipeline(source)


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("model_index.json", lambda text: "{", "is not JSON"),
        ("model_index.json", lambda text: "[]", "holds no JSON object"),
        (
            "model_index.json",
            lambda text: text.replace('"fps": 8.0', '"fps": "8"'),
            "fps = '8': has a wrong type",
        ),
        ("model_index.json", lambda text: text.replace('"fps": 8.0', '"fps": -8'), "fps = -8: must be from"),
        (
            "transformer/config.json",
            lambda text: text.replace('"depth": 2', '"depth": 3'),
            "weights are missing or not of this model",
        ),
        (
            "transformer/config.json",
            lambda text: text.replace('"depth": 2', '"depth": 1'),
            "weights are missing or not of this model",
        ),
        (
            "transformer/config.json",
            lambda text: text.replace('"hidden_size": 16', '"hidden_size": 32'),
            "shape",
        ),
        ("transformer/diffusion_pytorch_model.safetensors", lambda text: "", "pipeline could not be read"),
    ],
)
def test_a_damaged_pipeline_is_named(pipe, tmp_path, name, damage, message):
    pipe.save_pretrained(tmp_path)
    file = tmp_path / name
    file.write_text(damage(file.read_text(errors="replace")))
    with pytest.raises(
        UserError, match=r"has \d+ bytes, but \d+ were written|has changed since it was written"
    ):
        load_pipeline(tmp_path)
    for manifest in tmp_path.rglob("meta.json"):  # as diffusers writes it
        manifest.unlink()
    with pytest.raises(UserError, match=message):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("value", ['""', "true", "[8]"])
def test_wrong_settings_of_a_pipeline_are_refused_before_it_is_loaded(pipe, tmp_path, value):
    pipe.save_pretrained(tmp_path)
    (tmp_path / "meta.json").unlink()
    file = tmp_path / "model_index.json"
    file.write_text(file.read_text().replace('"num_frames": 4', f'"num_frames": {value}'))
    with pytest.raises(UserError, match="num_frames = .*: has a wrong type"):
        pipeline_settings(find_checkpoint_source(tmp_path))


def test_recorded_settings_that_are_no_object_are_refused():
    with pytest.raises(UserError, match="m.json: its settings of the pipeline are no JSON object: None"):
        check_recorded(None, "m.json: ")


def test_a_damaged_run_is_named(run):
    (run / "codec" / "codec.json").unlink()
    with pytest.raises(UserError, match="codec.json is missing"):
        load_pipeline(run)
    (run / "codec" / "meta.json").unlink()
    with pytest.raises(UserError, match="it has no codec.json"):
        load_pipeline(run)


def test_settings_come_from_the_checkpoint_and_not_from_the_config_that_people_may_edit(run):
    expected, _ = load_pipeline(run)
    (run / "config.yaml").write_text("codec: {name: [")
    loaded, _ = load_pipeline(run)
    assert loaded.config == expected.config and torch.equal(weight(loaded), weight(expected))


def test_a_pipeline_without_a_manifest_is_read_with_a_warning(pipe, tmp_path, caplog):
    pipe.save_pretrained(tmp_path)
    loaded, _ = load_pipeline(tmp_path)
    assert not caplog.records
    for manifest in tmp_path.rglob("meta.json"):
        manifest.unlink()
    again, _ = load_pipeline(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"pipeline {tmp_path} has no meta.json: a damaged file would not be noticed"
    ]
    assert torch.equal(weight(again), weight(loaded))


def test_the_hash_of_weights_in_several_files_is_that_of_all(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    one = load_pipeline(tmp_path)[1]
    shutil.rmtree(tmp_path / "transformer")
    pipe.transformer.save_pretrained(tmp_path / "transformer", max_shard_size="5KB")
    (tmp_path / "meta.json").unlink()
    files = sorted((tmp_path / "transformer").glob("*.safetensors"))
    (tmp_path / "transformer" / "meta.json").unlink(missing_ok=True)
    several = load_pipeline(tmp_path)[1]
    tensors = load_file(files[-1])
    save_file({name: value + 1 for name, value in tensors.items()}, files[-1], {"format": "pt"})
    assert len(files) > 1 and len({one, several, load_pipeline(tmp_path)[1]}) == 3


def test_a_pipeline_away_from_its_run(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    source = find_checkpoint_source(tmp_path / "pipeline")
    assert source.is_pipeline and source.run is None


def test_empty_folders(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_checkpoint_source(tmp_path / "absent")
    with pytest.raises(UserError, match="neither a complete checkpoint"):
        find_checkpoint_source(tmp_path)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(UserError, match="no meta.json"):
        find_checkpoint_source(tmp_path)
    with pytest.raises(UserError, match="no meta.json"):
        find_checkpoint_source(tmp_path / "checkpoints" / "step-00000001")


def test_weights_of_another_model(pipe, tmp_path):
    other = tiny_model(hidden_size=32)
    kept, pipe.transformer = pipe.transformer, other
    try:
        run = write_run(tmp_path / "run", pipe)
    finally:
        pipe.transformer = kept
    checkpoint = run / "checkpoints" / "step-00000010"
    config = checkpoint / "model" / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 16'))
    from stdit.checkpoint_files import read_meta
    from stdit.pipelines.weights import load_transformer

    with pytest.raises(UserError, match="tensors differ"):
        load_transformer(checkpoint, read_meta(checkpoint), ema=True)
    with pytest.raises(UserError, match="config.json has"):  # and no edited file gets that far
        load_pipeline(run / "checkpoints" / "step-00000010")


def test_a_checkpoint_away_from_its_run(run, tmp_path):
    moved = tmp_path / "elsewhere" / "here" / "step-00000010"
    moved.parent.mkdir(parents=True)
    (run / "checkpoints" / "step-00000010").rename(moved)
    with pytest.raises(UserError, match="no config.yaml"):
        load_pipeline(moved)


@pytest.mark.parametrize("load", [STDiTPipeline, DiffusionPipeline])
def test_variants_shards_and_pickles_are_written_and_read_as_in_diffusers(pipe, tmp_path, load):
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    parts = list((tmp_path / "transformer").glob("diffusion_pytorch_model.fp16-*.safetensors"))
    assert len(parts) > 1 and list((tmp_path / "text_encoder").glob("model.fp16-*.safetensors"))
    again = load.from_pretrained(str(tmp_path), variant="fp16", torch_dtype={"transformer": torch.bfloat16})
    assert again.transformer.dtype == torch.bfloat16 and again.text_encoder.dtype == torch.float32
    pipe.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert not list((tmp_path / "pickled" / "transformer").glob("*.safetensors"))
    again = load.from_pretrained(str(tmp_path / "pickled"))
    assert torch.equal(weight(again), weight(pipe))


@pytest.mark.parametrize("load", [STDiTPipeline, DiffusionPipeline])
def test_components_of_ours_are_not_divided_among_devices(load):
    with pytest.raises(
        UserError, match="device_map = balanced: diffusers cannot measure .* of stdit: give one"
    ):
        load.from_pretrained(str(bundled_folder()), device_map="balanced")


def test_a_device_for_all_components():
    pipe = STDiTPipeline.from_pretrained(device_map="cpu")
    assert pipe.device == torch.device("cpu")
    with pytest.raises(UserError, match="attention_kwargs has scael: may only have scale"):
        pipe("a red star", attention_kwargs={"scael": 1})
    again = STDiTPipeline.from_pipe(pipe)
    assert again.components == pipe.components and again.config == pipe.config
    assert again(
        "a red star", num_inference_steps=1, refine_pairs=0, num_frames=5, output_type="np"
    ).frames.any()


def test_a_compiled_codec_is_known(tmp_path):
    pipe = tiny_pipeline(tmp_path)
    codec = pipe.codec
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    assert type(pipe.codec) is type(codec)


@pytest.mark.parametrize("part", ["pipeline", "transformer", "scheduler"])
def test_what_is_pushed_to_the_hub_has_its_manifest(pipe, tmp_path, monkeypatch, part):
    uploaded = []

    def upload(self, working_dir, *args, **options):
        verify(Path(working_dir), kind="upload")
        uploaded.append(Path(working_dir).name)

    monkeypatch.setattr(PushToHubMixin, "_upload_folder", upload)
    repository = SimpleNamespace(repo_id="me/it")
    card = SimpleNamespace(save=lambda path: Path(path).write_text("a card"))
    for module in ("pipelines.pipeline_utils", "models.modeling_utils", "configuration_utils"):
        monkeypatch.setattr(f"diffusers.{module}.create_repo", lambda *args, **options: repository)
    for module in ("pipelines.pipeline_utils", "models.modeling_utils"):
        monkeypatch.setattr(f"diffusers.{module}.load_or_create_model_card", lambda *args, **options: None)
        monkeypatch.setattr(f"diffusers.{module}.populate_model_card", lambda *args, **options: card)
    pushed = pipe if part == "pipeline" else getattr(pipe, part)
    pushed.save_pretrained(str(tmp_path / "it"), push_to_hub=True)
    assert uploaded == ["it"]


def test_a_pipeline_of_an_earlier_version_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    file.write_text(file.read_text().replace('"vae"', '"codec"'))
    (tmp_path / "meta.json").unlink()
    with pytest.raises(UserError, match="an earlier version of stdit exported it"):
        load_pipeline(tmp_path)
