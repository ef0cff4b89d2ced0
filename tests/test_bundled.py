"""The small model that comes with stdit: made by scripts/bundle.py, used where no checkpoint is given."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import sample
import train
from scripts import bundle, evaluate_adherence
from stdit import cli
from stdit.checkpoint_files import seal_folder
from stdit.codecs.compact_weights import compact_folder
from stdit.codecs.tiny import PACKAGED
from stdit.data.shapes.build import ShapesConfig
from stdit.evaluation import prompts
from stdit.pipelines import STDiTPipeline, load_pipeline
from stdit.pipelines.bundled import HOW_TO_GET
from tests.training.tiny import tiny_settings

Command = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[1]
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of train.py with a fitted codec."""
    folder = tmp_path_factory.mktemp("run")
    codec = ["--codec.name", "pca", "--codec.stride", "[1, 4, 4]", "--codec.channels", "6"]
    settings = [*tiny_settings(folder), *codec, "--model.patch_size", "[1, 1, 1]", "--trainer.steps", "3"]
    AcceleratorState._reset_state(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *settings, "--validation.num_inference_steps", "2"])
        assert train.main() == 0
    return folder / "outputs" / "tiny"


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where the model that comes with stdit is looked for; the current one is empty."""
    folder = tmp_path / "stdit" / "bundled"
    monkeypatch.setattr("stdit.pipelines.bundled.BUNDLED", folder)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Command:
    """Return a function that runs a command: exit code, stdout, and stderr with the log."""

    def call(module: object, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.run(module.main)  # type: ignore[attr-defined]
        output, errors = capfd.readouterr()
        logged = "\n".join(caplog.messages)
        caplog.clear()
        return int(end.value.code or 0), output, errors + logged

    return call


@pytest.fixture
def made(run: Path, bundled: Path, command: Command) -> Path:
    assert command(bundle, "--checkpoint", run, "--output", bundled)[0] == 0
    return bundled


def test_matrices_are_stored_in_bf16_and_computed_with_in_fp32(run: Path, made: Path) -> None:
    average = load_file(run / "checkpoints" / "step-00000003" / "ema" / "ema.safetensors")
    stored, codec = load_file(made / "transformer" / FILE), load_file(made / "vae" / FILE)
    for tensor in (*stored.values(), *codec.values()):
        assert tensor.dtype == (torch.bfloat16 if tensor.ndim > 1 else torch.float32)
    for pipe in (STDiTPipeline.from_pretrained(), load_pipeline()[0]):
        weights = pipe.transformer.state_dict()
        for name, tensor in average.items():
            expected = tensor.bfloat16().float() if tensor.ndim > 1 else tensor
            assert weights[name].dtype == torch.float32 and torch.equal(weights[name], expected)
        assert all(tensor.dtype == torch.float32 for tensor in pipe.codec.state_dict().values())
        frames = pipe("the red square moves left", output_type="pt", generator=torch.Generator()).frames
        assert frames.shape == (1, 4, 3, 8, 8) and frames.dtype == torch.float32


def test_the_packaged_codec_is_not_replaced_by_another_one(
    run: Path, bundled: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stdit.training.bundle.BUNDLED", bundled)
    shutil.copytree(PACKAGED, bundled / "vae")
    seal_folder(bundled, ["vae"])
    flags = ["--checkpoint", run, "--output", bundled]
    code, _, errors = command(bundle, *flags)
    assert code == 2 and "the run's codec is not the one in" in errors and errors.count("\n") == 1
    assert sorted(path.name for path in bundled.iterdir()) == ["meta.json", "vae"]
    shutil.rmtree(bundled / "vae")
    assert "the run's codec is not the one in" in command(bundle, *flags)[2], "it is known by the manifest"
    shutil.copytree(run / "codec", bundled / "vae")
    compact_folder(bundled / "vae")
    seal_folder(bundled, ["vae"])
    assert command(bundle, *flags)[0] == 0
    (bundled / "vae" / FILE).write_bytes(b"damaged")
    assert command(bundle, *flags)[0] == 0, "a damaged codec is replaced by itself"
    assert load_file(bundled / "vae" / FILE)


def test_the_origin_is_recorded(run: Path, made: Path, command: Command, tmp_path: Path) -> None:
    rates = {
        "scores": {"heldout": {"n": 8, "strict": 0.75, "lenient": 1.0}},
        "weights": "others",
        "videos": [],
    }
    flags = ["--scores", tmp_path / "scores.json", "--output", made]
    before = (made / "origin.json").read_bytes()
    (tmp_path / "scores.json").write_text(json.dumps(rates))
    code, _, errors = command(bundle, *flags)
    assert (
        code and "are those of the weights others" in errors and (made / "origin.json").read_bytes() == before
    )
    rates["weights"] = load_pipeline()[1]
    for wrong, reason in (
        ({"scores": {}}, "it has no scores"),
        ({"scores": {"heldout": {"strict": "x"}}}, "it has no scores"),
        ({"scores": {"heldout": 1}}, "it has no scores"),
        ({"weights": None}, "these are not of a model"),
        ({"scores": {"heldout": {"strict": True}}}, "it has no scores"),
        ({"scores": {"heldout": {"strict": float("nan")}}}, "it has no scores"),
        ({"changed_settings": [1]}, "these were measured with changed_settings = [1]"),
        ({"changed_settings": {"refine_pairs": 0}}, "these were measured with refine_pairs = 0"),
    ):
        (tmp_path / "scores.json").write_text(json.dumps(rates | wrong))
        code, _, errors = command(bundle, *flags)
        assert (code, errors.count("\n")) == (2, 1) and reason in errors
    assert "there is no such file" in command(bundle, "--scores", tmp_path / "no.json", "--output", made)[2]
    assert (made / "origin.json").read_bytes() == before
    (tmp_path / "scores.json").write_text(json.dumps(rates))
    assert "there is no bundled pipeline" in command(bundle, *flags[:2], "--output", tmp_path / "no")[2]
    code, output, errors = command(bundle, *flags)
    assert code == 0, errors
    origin = json.loads((made / "origin.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert origin["step"] == 3 and origin["scores"] == rates["scores"]
    assert origin["loss"] == pytest.approx(sum(line["loss"] for line in lines) / 3)
    assert origin["config"]["codec"]["name"] == "pca" and origin["config"]["trainer"]["steps"] == 3
    assert origin["weights"] == load_pipeline()[1] and origin["weights"] in output
    assert origin["commit"] is None or len(origin["commit"].removesuffix("+changes")) == 40
    assert "3 steps in 0.0 hours" in output and "heldout: strict 75%, lenient 100%" in output
    assert "MB (scheduler 0.00, text_encoder 0." in output


def test_prompts_without_a_checkpoint(made: Path, command: Command) -> None:
    prompts = ["--prompt", "the red square moves left", "--prompt", "the red square"]
    code, output, errors = command(sample, *prompts)
    assert code == 0, errors
    videos = sorted(Path("outputs/samples").glob("*.mp4"))
    assert [json.loads(video.with_suffix(".json").read_text())["prompt"] for video in videos] == prompts[1::2]
    facts = json.loads(videos[0].with_suffix(".json").read_text())
    assert (facts["num_frames"], facts["height"], facts["num_inference_steps"]) == (4, 8, 2)
    assert all(str(video) in output for video in (*videos, Path("outputs/samples/sheet.png")))
    assert "its training: " in output and " parameters, 3 steps" in output
    assert "trained on" not in errors, "words and size are those of training"
    code, output, _ = command(sample, *prompts)
    assert code == 0 and "all 2 videos are finished already" in output
    assert "*" in command(sample, "--list_sizes")[1]


def test_the_commands_that_make_it_are_those_of_its_config() -> None:
    lines = (ROOT / "configs" / "train" / "shapes64.yaml").read_text(encoding="utf-8").splitlines()
    commands = [line.removeprefix("#").strip() for line in lines if line.startswith("#   python ")]
    assert len(commands) == 2 and "; ".join(commands) in HOW_TO_GET


def test_an_origin_that_bundle_did_not_write_is_an_error(run: Path, command: Command) -> None:
    (run / "pipeline" / "origin.json").write_text('{"from": "me"}')
    code, _, errors = command(sample, "--checkpoint", run / "pipeline", "--prompt", "a")
    (run / "pipeline" / "origin.json").unlink()
    assert (code, errors.count("\n")) == (2, 1) and "it has no 'parameters'" in errors


def test_why_checkpoints_were_skipped_is_said(
    run: Path, bundled: Path, command: Command, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    older, newest = sorted((copy / "checkpoints").iterdir())
    (newest / "ema" / "ema.safetensors").unlink()
    code, _, errors = command(bundle, "--checkpoint", copy, "--output", bundled)
    assert code == 0 and f"skipped checkpoint: checkpoint {newest}: ema/ema.safetensors is missing" in errors
    (older / "ema" / "ema.safetensors").unlink()
    code, _, errors = command(bundle, "--checkpoint", copy, "--output", bundled)
    assert code == 2 and "no complete one: " in errors and "ema.safetensors is missing" in errors


def test_words_and_sizes_of_no_clip_are_named(made: Path, command: Command) -> None:
    flags = ["--num_samples", "2", "--num_frames", "5", "--fps", "6"]
    prompts = [
        "--prompt",
        "A Red zebra, moves",
        "--prompt",
        "ein rotes square",
        "--prompt",
        "the red square",
        "--prompt",
        "!!!",
    ]
    code, _, errors = command(sample, *prompts, *flags)
    assert code == 0
    warnings = [line for line in errors.splitlines() if line.startswith(("prompt ", "5 frames"))]
    assert warnings == [
        'prompt "A Red zebra, moves": the model was trained on no caption with the words "a", "zebra": it may ignore '
        "or mistake them",
        'prompt "ein rotes square": the model was trained on no caption with the words "ein", "rotes": it may ignore '
        "or mistake them",
        'prompt "!!!": it has no word that the model could follow',
        "5 frames of 8x8 at 6 fps: the model was not trained on that, but on 4 frames of 8x8 at 8 fps: the videos "
        "may be worse",
    ]


def test_a_pipeline_without_a_vocabulary_knows_no_unknown_words(run: Path, command: Command) -> None:
    flags = ["--num_inference_steps", "1", "--output", run.parent / "zebra"]
    code, _, errors = command(sample, "--checkpoint", run, "--prompt", "a zebra", *flags)
    assert code == 0 and "trained on" not in errors


@pytest.mark.parametrize("flags", [["--prompt", "a"], ["--list_sizes"]])
def test_a_missing_model_is_an_error_that_says_how_to_make_it(
    bundled: Path, command: Command, flags: list[str]
) -> None:
    code, output, errors = command(sample, *flags)
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: no checkpoint, and no model comes with this stdit")
    assert "python scripts/bundle.py --checkpoint outputs/shapes64" in errors
    assert not list(Path().iterdir())


@pytest.mark.parametrize("file", ["model_index.json", f"transformer/{FILE}", "meta.json"])
def test_a_damaged_model_is_an_error_that_names_the_file(made: Path, command: Command, file: str) -> None:
    content = bytearray((made / file).read_bytes())
    content[len(content) // 2] ^= 1
    (made / file).write_bytes(content)
    code, output, errors = command(sample, "--prompt", "a")
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert file in errors and "install stdit again" in errors and "scripts/bundle.py" in errors
    (made / file).unlink()
    code, _, errors = command(sample, "--prompt", "a")
    assert code == 2 and file in errors and "scripts/bundle.py" in errors
    assert not list(Path().iterdir())


def test_other_weights_than_the_averaged_ones_are_refused(made: Path, command: Command) -> None:
    code, _, errors = command(sample, "--prompt", "a", "--ema", "false")
    assert code == 2 and "whose only weights are the averaged ones" in errors


def test_it_is_scored_without_a_checkpoint(made: Path, command: Command, tmp_path: Path) -> None:
    columns = "prompt,shape,colour,motion,background\n"
    (tmp_path / "one.csv").write_text(f"{columns}a red circle rising,circle,red,up,black\n")
    scores = tmp_path / "scores.json"
    flags = ["--prompts", tmp_path / "one.csv", "--num_frames", "8", "--size", "32", "--output", scores]
    code, output, errors = command(evaluate_adherence, *flags)
    assert code == 0, errors
    found = json.loads(scores.read_text())
    assert found["scores"]["one"]["n"] == 1 and found["weights"] == load_pipeline()[1]
    shutil.rmtree(made)
    code, _, errors = command(evaluate_adherence)
    assert code == 2 and "scripts/bundle.py" in errors


def test_the_prompts_that_score_it_are_those_of_its_world(monkeypatch: pytest.MonkeyPatch) -> None:
    few = ShapesConfig.of("64", num_clips=10)
    monkeypatch.setattr(ShapesConfig, "of", lambda world: few)
    world, expected = prompts.default_prompts(videos=False, size=64)
    assert world.name == "64" and {row["set"] for row in expected} == {*prompts.SETS, *prompts.PAIR_SETS}
    assert all(row.keys() == {"set", "prompt", *world.attributes} for row in expected)


def test_a_model_that_is_too_large_is_refused(
    made: Path, run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file: file.read_bytes() for file in made.rglob("*") if file.is_file()}
    monkeypatch.setattr("stdit.training.bundle.MAX_BYTES", 10_000)
    code, _, errors = command(bundle, "--checkpoint", run, "--output", made)
    assert code == 2 and "MB (" in errors and "transformer 0." in errors and "at most 0 MB" in errors
    assert before == {file: file.read_bytes() for file in made.parent.rglob("*") if file.is_file()}


@pytest.mark.parametrize("output", ["mine", "mine/notes.txt", "."])
def test_other_files_are_not_replaced(
    run: Path, tmp_path: Path, command: Command, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    code, _, errors = command(bundle, "--checkpoint", run, "--output", output)
    assert code == 2 and "exists, and is no bundled pipeline" in errors and errors.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


@pytest.mark.parametrize(
    "place", ["{}/notes.txt", "{}/transformer/notes.txt", "{}.old/notes.txt", "{}.tmp/notes.txt"]
)
def test_files_inside_or_beside_an_older_bundle_are_not_removed(
    run: Path, made: Path, command: Command, place: str, tmp_path: Path
) -> None:
    file = made.parent / place.format(made.name)
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    scores = tmp_path / "scores.json"
    scores.write_text('{"scores": {"heldout": {"n": 1}}, "weights": "xxh3:0"}')
    commands: list[list[str | Path]] = [["--checkpoint", run]]
    if made in file.parents:
        (made / "model_index.json").unlink()
    else:
        commands.append(["--scores", scores])
    for flags in commands:
        code, _, errors = command(bundle, *flags, "--output", made)
        assert code == 2 and "choose another --output" in errors and errors.count("\n") == 1
    assert file.read_text() == "mine"


def test_an_older_bundle_is_replaced_also_without_its_manifest(
    run: Path, made: Path, command: Command
) -> None:
    (made / "meta.json").unlink()
    assert command(bundle, "--checkpoint", run, "--output", made)[0] == 0
    assert (made / "meta.json").is_file()


def test_an_incomplete_last_line_of_the_metrics_is_left_out(run: Path, made: Path, command: Command) -> None:
    metrics, origin = run / "metrics.jsonl", (made / "origin.json").read_bytes()
    lines = metrics.read_bytes()
    try:
        metrics.write_bytes(lines + b'{"step": 3, "lo')
        assert command(bundle, "--checkpoint", run, "--output", made)[0] == 0
        assert (made / "origin.json").read_bytes() == origin
        metrics.write_bytes(b"{\n" + lines)
        code, _, errors = command(bundle, "--checkpoint", run, "--output", made)
        assert code == 2 and "metrics.jsonl: line 1 is damaged" in errors
    finally:
        metrics.write_bytes(lines)


def test_a_pipeline_alone_is_not_bundled(run: Path, tmp_path: Path, command: Command) -> None:
    shutil.copytree(run / "pipeline", tmp_path / "alone")
    code, _, errors = command(bundle, "--checkpoint", tmp_path / "alone", "--output", tmp_path / "out")
    assert code == 2 and "give a run folder" in errors and not (tmp_path / "out").exists()
