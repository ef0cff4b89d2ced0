"""Configs by name: all files of configs/ are found in a clone, files on disk win, and a wrong name is explained."""

from pathlib import Path

import pytest

from stdit import named_configs
from stdit.errors import UserError
from stdit.named_configs import find_config
from stdit.pipelines.config import SampleConfig
from stdit.settings import parse
from stdit.training.config import parse_train

ROOT = Path(__file__).parents[1]
CONFIGS = {
    path.relative_to(ROOT / "configs").with_suffix("").as_posix(): path
    for path in (ROOT / "configs").rglob("*.yaml")
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder without configs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_config_has_a_name() -> None:
    assert named_configs.named_configs() == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_found_by_name(name: str) -> None:
    for spelling in (name, f"{name}.yaml", f"configs/{name}", f"configs/{name}.yaml"):
        assert find_config(spelling) == CONFIGS[name]


@pytest.mark.parametrize("name", ["train/finetune", "configs/train/finetune.yaml"])
def test_a_former_name_works_and_says_so(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert find_config(name) == CONFIGS["train/own-clips"]
    assert f"--config {name}: this config is now called train/own-clips" in caplog.text


def test_a_name_gives_the_settings_of_its_file() -> None:
    file = str(CONFIGS["train/quickstart"])
    assert parse_train(["--config", "train/quickstart"]) == parse_train(["--config", file])
    assert parse_train(["--config=train/quickstart", "--config", "models/S"]).model.hidden_size == 384
    assert parse(SampleConfig, ["--config", "sample/240p-2s.yaml"]).resolution == "240p"


@pytest.mark.parametrize("name", ["train/quickstart", "train/quickstart.yaml"])
def test_a_file_on_disk_wins(name: str, elsewhere: Path) -> None:
    (elsewhere / "train").mkdir()
    (elsewhere / "train" / "quickstart.yaml").write_text("name: mine\ndata: {manifest: a.csv}\n")
    assert parse_train(["--config", name]).name == "mine"


def test_a_folder_on_disk_hides_no_name(elsewhere: Path) -> None:
    (elsewhere / "train" / "quickstart").mkdir(parents=True)
    assert parse_train(["--config", "train/quickstart"]).name == "quickstart"
    with pytest.raises(UserError, match="--config train: is a folder"):
        parse_train(["--config", "train"])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("quickstart", "did you mean train/quickstart or sample/quickstart?"),
        ("train/quikstart.yaml", "did you mean train/quickstart or sample/quickstart?"),
        ("models/XL", "did you mean models/XL-2 or "),
        ("240p-2s", "did you mean sample/240p-2s or "),
        ("models", "choose models/"),
        ("own.yaml", "its names begin with buckets/, codecs/, models/, sample/, train/."),
    ],
)
def test_an_unknown_name_lists_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        parse_train(["--config", name])
    assert str(error.value).startswith(f"--config {name}: cannot be read: there is no such file")
    assert hint in str(error.value)
