"""What a server offers: models of runs, adapters, and what is damaged."""

from pathlib import Path

import pytest

from stdit.pipelines.pipeline import STDiTPipeline
from stdit.serve.errors import RequestError
from stdit.serve.queue.catalog import Catalog
from tests.lora.tiny import write_random_adapter
from tests.pipelines.tiny import tiny_pipeline, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs: one of three checkpoints, one that was exported; and files that are no runs."""
    folder = tmp_path_factory.mktemp("outputs")
    write_run(folder / "first", tiny_pipeline(folder))
    (folder / "exported").mkdir()
    tiny_pipeline(folder).save_pretrained(folder / "exported" / "pipeline")
    (folder / "notes.txt").write_text("no run")
    (folder / ".hidden").mkdir()
    (folder / "link").symlink_to(folder / "first")
    return folder


def test_models_are_the_bundled_one_the_runs_and_their_checkpoints(runs: Path) -> None:
    catalog = Catalog(runs)
    names = list(catalog.folders())
    assert names[0] == catalog.default == "bundled" and "exported" in names and "first" in names
    assert not {"link", ".hidden", "notes.txt"} & set(names)
    assert any(name.startswith("first/step-") for name in names)
    for entry in catalog.list_models():
        assert entry["error"] is None and entry["defaults"]["num_frames"] >= 1, entry


def test_a_checkpoint_may_be_the_default(runs: Path) -> None:
    catalog = Catalog(runs, str(runs / "first"))
    assert catalog.default == "first" and catalog.model(None).name == "first"
    assert Catalog(runs / "nowhere", str(runs / "first")).model(None).source.run == runs / "first"


def test_a_damaged_model_is_named_and_one_that_is_mended_is_offered(runs: Path) -> None:
    catalog = Catalog(runs)
    file = runs / "exported" / "pipeline" / "model_index.json"
    whole = file.read_text()
    file.write_text("{")
    with pytest.raises(RequestError, match="model_index.json") as caught:
        catalog.model("exported")
    assert caught.value.param == "model"
    file.write_text(whole)
    assert catalog.model("exported").name == "exported"


@pytest.mark.parametrize(
    "name", ["", "..", "../outputs", "first/../../etc", "/etc", "first/step-99999999", "a\0b"]
)
def test_a_name_is_never_a_path(runs: Path, name: str) -> None:
    with pytest.raises(RequestError, match="there is no such model"):
        Catalog(runs).model(name)


def test_weights_are_found_by_the_hash_that_videos_record(runs: Path) -> None:
    from stdit.pipelines.loading import load_pipeline

    catalog = Catalog(runs)
    for name in ("bundled", "first", "exported"):
        _, weights = load_pipeline(catalog.model(name).source)
        found = catalog.find_weights(weights)
        assert found is not None and catalog._hash(catalog.model(found)) == weights
    assert catalog.find_weights("xxh3:none") is None


def test_adapters_are_those_of_runs_and_of_a_folder(runs: Path, tmp_path: Path) -> None:
    model = STDiTPipeline.from_pretrained().transformer
    write_random_adapter(tmp_path / "style.safetensors", model)
    (tmp_path / "damaged.safetensors").write_bytes(b"no adapter")
    catalog = Catalog(runs, loras=tmp_path)
    assert [entry["id"] for entry in catalog.list_adapters()] == ["style"]
    assert catalog.adapter("style") == tmp_path / "style.safetensors"
    with pytest.raises(RequestError, match="there is no adapter"):
        catalog.adapter("../style")
