import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from stdit.codecs.config import CODECS
from stdit.data.config import ASPECT_RATIOS, LENGTHS, RESOLUTIONS, SourceConfig, resolve_size
from stdit.errors import UserError
from stdit.pipelines.config import SampleConfig
from stdit.settings import parse, to_yaml
from stdit.training.config import parse_train
from stdit.training.experiment import experiment_key

ROOT = Path(__file__).parents[2]
GIVEN = ["--data.manifest", "clips.csv"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "train").glob("*.yaml")), ids=lambda path: path.stem
)
def test_training_configs_are_right(path: Path) -> None:
    base = ["--init_from", "outputs/base"] if path.stem.startswith("lora") else []
    given = [] if "sources:\n" in path.read_text(encoding="utf-8") else GIVEN
    config = parse_train(["--config", str(path), *given, *base])
    assert config.name == path.stem


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "models").glob("*.yaml")), ids=lambda path: path.stem
)
def test_model_configs_are_right(path: Path) -> None:
    config = parse_train(["--config", str(path), *GIVEN])
    for key, value in yaml.safe_load(path.read_text())["model"].items():
        found = getattr(config.model, key)
        assert (list(found) if isinstance(found, tuple) else found) == value


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_of_open_sora(stage: int) -> None:
    files = [ROOT / "configs" / "train" / f"{name}.yaml" for name in ("opensora", f"opensora-stage{stage}")]
    config = parse_train([*(f"--config={file}" for file in files), *GIVEN])
    assert (config.optimizer.lr, config.optimizer.eps, config.trainer.max_grad_norm) == (1e-4, 1e-15, 1.0)
    assert (config.ema.decay, config.flow.caption_dropout, config.model.depth) == (0.99, 0.1, 28)
    assert config.flow.shift_by_size and config.flow.timestep_sampling == "logit_normal"
    assert sum(config.flow.conditioning.values()) == pytest.approx({1: 0.2, 2: 0.2, 3: 0.25}[stage])
    images = {b.resolution: b.batch_size for b in config.data.buckets if b.num_frames == 1}
    assert images["144p"] == 475 and images["2048"] == 5
    assert {b.num_frames for b in config.data.buckets} == set(LENGTHS.values())


@pytest.mark.parametrize("name", RESOLUTIONS)
def test_buckets_of_open_sora_follow_the_rule(name: str) -> None:
    file = ROOT / "configs" / "buckets" / f"opensora-{name}.yaml"
    buckets = parse_train(["--config", str(file), *GIVEN]).data.buckets
    lengths = {"480p": 4, "720p": 3, "1080p": 1}
    expected = [
        (name, aspect_ratio, frames)
        for frames in list(LENGTHS.values())[: lengths.get(name)]
        for aspect_ratio in ASPECT_RATIOS
    ]
    assert [(b.resolution, b.aspect_ratio, b.num_frames) for b in buckets] == expected
    assert all(b.size() == resolve_size(str(b.resolution), b.aspect_ratio) for b in buckets)
    pixels = [b.num_frames * math.prod(b.size()) * b.batch_size for b in buckets]
    assert max(pixels) < 150e6  # what one GPU of 80 GB holds of Open-Sora's


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "sample").glob("*.yaml")), ids=lambda path: path.stem
)
def test_sampling_configs_are_right(path: Path) -> None:
    config = parse(SampleConfig, ["--config", str(path)])
    if path.stem[0].isdigit():
        resolution, length = path.stem.split("-")
        assert (config.resolution, config.num_frames) == (resolution, LENGTHS[length])


def test_the_setting_that_patterns_replace_names_them() -> None:
    with pytest.raises(UserError, match="'S T' for alternate, 'S T T S' for paired"):
        parse_train([*GIVEN, "--model.block_order", "paired"])


def test_a_grid_sets_sp() -> None:
    config = parse_train([*GIVEN, "--parallel.grid", "[4, 2]"]).parallel
    assert (config.sp, config.grid) == (8, (4, 2))
    assert parse_train([*GIVEN, "--parallel.grid", "[1, 2]", "--parallel.sp", "2"]).parallel.sp == 2
    for flags, message in (
        (["[2, 2]", "--parallel.sp", "3"], "has 4 ranks, but parallel.sp = 3: leave sp out, or let the two"),
        (["[0, 2]"], r"parallel.grid = \[0, 2\]: must be two numbers of parts"),
        (["[2]"], "parallel.grid"),
        (["auto", "--parallel.link_gbit", "0"], "parallel.link_gbit = 0.0: must be positive"),
        (["auto", "--parallel.latency_us", "nan"], "parallel.latency_us = nan: must be a number"),
        (["auto", "--parallel.tflops", "-1"], "parallel.tflops = -1.0: must be positive"),
    ):
        with pytest.raises(UserError, match=message):
            parse_train([*GIVEN, "--parallel.grid", *flags])


def test_a_written_config_reads_back_the_same(tmp_path: Path) -> None:
    config = parse_train(
        [*GIVEN, "--name", "é", "--flow.conditioning.first", "0.2", "--trainer.max_grad_norm", ".inf"]
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert parse_train(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "data.manifest is empty"),
        ([*GIVEN, "--name", "../x"], "name = '../x'"),
        ([*GIVEN, "--name", ""], "name = ''"),
        ([*GIVEN, "--seed", "-1"], "seed = -1"),
        ([*GIVEN, "--flow.prediction", "residual"], "use codec.name = pca"),
        ([*GIVEN, "--data.cache", "memory", "--data.crop", "random"], "data.cache = memory"),
        ([*GIVEN, "--flow.conditioning.first", "0.1", "--model.patch_size", "[2, 2, 2]"], "one frame long"),
        ([*GIVEN, "--model.num_heads", "7"], "model.num_heads = 7"),
        ([*GIVEN, "--data.buckets", "[{num_frames: 0, height: 8, width: 8}]"], "num_frames is 0"),
        ([*GIVEN, "--trainer.steps", "0"], "trainer.steps = 0"),
        ([*GIVEN, "--tracker.name", "wandbb"], "must be one of none, tensorboard, wandb"),
        ([*GIVEN, "--optimizer.learning_rate", "1"], "--optimizer.learning_rate is not a setting"),
    ],
)
def test_settings_that_do_not_go_together(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_train(argv)
    assert message in str(error.value)


def test_the_experiment_is_what_decides_the_numbers() -> None:
    config = parse_train(GIVEN)
    key = experiment_key(config)
    assert {"seed", "model.depth", "codec.name", "flow.prediction", "data.buckets", "optimizer.lr"} <= set(
        key
    )
    free = {
        "data.manifest": "moved.csv", "data.workers": "2", "trainer.steps": "7", "validation.every": "3",
        "tracker.name": "wandb", "checkpoint.every": "9",
    }  # fmt: skip
    other = parse_train([part for key, value in free.items() for part in (f"--{key}", value)])
    assert experiment_key(other) == key
    assert experiment_key(replace(config, seed=1)) != key
    assert experiment_key(parse_train([*GIVEN, "--flow.conditioning.first", "0.1"])) != key


def test_several_sources_from_a_file_or_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "data:\n  caption_scores: [motion]\n  sources:\n    - {manifest: films.parquet}\n"
        '    - {manifest: "shards/{00..99}.tar", root: shards, weight: 0.5}\n'
    )
    config = parse_train(["--config", str(file)])
    shards = SourceConfig("shards/{00..99}.tar", "shards", 0.5)
    assert config.data.sources == [SourceConfig("films.parquet"), shards]
    assert config.data.caption_scores == ["motion"]
    moved = parse_train(["--config", str(file), "--data.sources", "[{manifest: moved.csv}]"])
    assert moved.data.sources == [SourceConfig("moved.csv")] and experiment_key(moved) == experiment_key(
        config
    )
    file.write_text("data: {sources: [{manifest: a.csv, wieght: 2}]}\n")
    with pytest.raises(UserError, match="weight"):
        parse_train(["--config", str(file)])


def test_a_registered_codec_may_use_the_residual_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*GIVEN, "--codec.name", "mine", "--flow.prediction", "residual"]
    for names, value in ((CODECS._entries, "my_module:Codec"), (CODECS._modules, "my_module")):
        monkeypatch.setitem(names, "mine", value)
    assert parse_train(flags).flow.prediction == "residual"


HEAVY = {"torch", "diffusers", "transformers", "accelerate", "wandb", "av", "PIL", "numpy"}


@pytest.mark.parametrize("argv", [GIVEN, ["--help"]], ids=["settings", "help"])
def test_reading_settings_imports_no_torch(argv: list[str]) -> None:
    code = (
        "import sys, train\n"
        "from stdit.training.config import parse_train\n"
        f"try: parse_train({argv})\n"
        "except SystemExit as end: assert not end.code\n"
        f"print('heavy:', sorted({HEAVY} & {{*sys.modules}}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.splitlines()[-1] == "heavy: []"
