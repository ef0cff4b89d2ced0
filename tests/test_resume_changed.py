"""Runs that resume with other clips or settings: what is said, what is allowed, and what is recorded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from stdit.data.batch import EncodedBatch
from stdit.errors import UserError
from stdit.pipelines.loading import load_pipeline
from stdit.pipelines.video_io import read_metadata
from stdit.training.spikes import SpikeGuard
from stdit.training.trainer import Trainer
from tests import warm
from tests.launch import launch
from tests.test_train import Settings, command, do, metrics, numbers, same_state, settings
from tests.training.tiny import tiny_settings

__all__ = ["settings"]
CHANGED = 4
"""The step at which the runs change."""
LAST = 8


def mend(clips: Path) -> Path:
    """Return a manifest beside the one of the tiny clips: a mended caption, and a clip that is listed again."""
    rows = (clips / "manifest.csv").read_text().splitlines()
    assert rows[2] == "clip-1.mp4,the red square moves left"
    rows[2] = "clip-1.mp4,a mended caption"
    (clips / "mended.csv").write_text("\n".join([*rows, "clip-3.mp4,another clip"]) + "\n")
    return clips / "mended.csv"


WORDS = (
    '5 -> 6 clips (new: row 6 (clip-3.mp4)); caption of row 2 (clip-1.mp4): "the red square moves left" -> '
    '"a mended caption"; optimizer.lr 0.001 -> 0.0005'
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips and a run of `CHANGED` steps, to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    assert do([*tiny_settings(folder), "--trainer.steps", str(CHANGED)]) == 0
    return folder


@pytest.fixture
def changed(trained: Path, settings: Settings, tmp_path: Path) -> Callable[..., list[str]]:
    """Copy a run that was trained until `CHANGED`; return its settings from then on."""
    shutil.copytree(trained / "outputs", tmp_path / "outputs")
    manifest = mend(tmp_path / "clips")
    return lambda **flags: settings(
        **{"trainer__steps": LAST, "data__manifest": manifest, "optimizer__lr": 5e-4, **flags}
    )


def copy(tmp_path: Path, name: str) -> Path:
    """Copy the run, so that it is resumed twice."""
    return Path(shutil.copytree(tmp_path / "outputs" / "tiny", tmp_path / "outputs" / name))


def kill_in(patch: pytest.MonkeyPatch, step: int) -> None:
    original = Trainer.step

    def stepping(self: Trainer, batch: EncodedBatch) -> dict[str, Any]:
        if batch.step == step:
            raise RuntimeError("killed")
        return original(self, batch)

    patch.setattr(Trainer, "step", stepping)


def test_what_changed_is_said_and_nothing_is_touched(
    changed: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "outputs" / "tiny"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    result = command(changed())
    assert result.returncode == 2
    assert result.stderr == (
        f"error: checkpoint {run}/checkpoints/step-00000004 is of another experiment: {WORDS}. "
        "Add --resume_changed to continue from step 4 with that, go back to what it was, or choose another --name "
        f"(and start from its weights by --init_from {run}/checkpoints/step-00000004).\n"
    )
    assert before == {path: path.read_bytes() for path in before}
    assert {path for path in run.rglob("*") if path.is_file()} == {*before, run / ".lock"}


def test_a_changed_run_continues_and_is_the_same_after_kills(
    changed: Callable[..., list[str]],
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    straight, killed = copy(tmp_path, "straight"), copy(tmp_path, "killed")
    assert do(changed(name="straight", resume_changed=True)) == 0
    assert (
        f"resumed from step 4 ({straight}/checkpoints/step-00000004), with {WORDS}\n"
        in capsys.readouterr().out
    )
    for step, flags in (
        (5, {"resume_changed": True}),
        (7, {"resume_changed": True}),
    ):  # before and after a save
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
            kill_in(patch, step)
            do(changed(name="killed", checkpoint__asynchronous=False, **flags))
    capsys.readouterr()
    assert do(changed(name="killed")) == 0  # from step 6 on it is the same experiment, without the flag
    said = capsys.readouterr().out
    assert f"resumed from step 6 ({killed}/checkpoints/step-00000006)\n" in said
    assert numbers(straight) == numbers(killed) and len(numbers(killed)) == LAST
    assert same_state(*(run / "checkpoints" / "step-00000008" for run in (straight, killed)))
    for run in (straight, killed):
        metas = [
            json.loads((run / "checkpoints" / f"step-0000000{step}" / "meta.json").read_text())
            for step in (6, 8)
        ]
        assert metas[0]["lineage"] == metas[1]["lineage"] and metas[1]["config"]["resume_changed"] is False
        (entry,) = metas[1]["lineage"]
        assert (entry["step"], "; ".join(entry["changes"])) == (4, WORDS) and entry["from"] != entry["to"]
        assert load_pipeline(run / "pipeline")[0].config["lineage"] == [entry]
        assert load_pipeline(run / "checkpoints" / "step-00000008")[0].config["lineage"] == [entry]
    with pytest.raises(UserError, match="6 -> 5 clips"):
        do(settings(name="killed", optimizer__lr=5e-4, trainer__steps=LAST + 1))


@pytest.mark.parametrize(
    "cache", [*(pytest.param(cache, marks=pytest.mark.slow) for cache in ("none", "memory")), "disk"]
)
def test_batches_after_a_change_are_those_of_a_run_with_the_new_clips(
    changed: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    """Step, seed and clips give the batch, with the new states of the mended caption, whatever the cache holds."""
    shutil.rmtree(tmp_path / "outputs" / "tiny")
    last = 9  # steps 6 to 8 are a whole epoch of the new clips
    argv, after = (
        changed(data__cache=cache, trainer__steps=last, checkpoint__every=last),
        range(CHANGED, last),
    )
    old = [*argv, "--data.manifest", str(tmp_path / "clips" / "manifest.csv"), "--optimizer.lr", "0.001"]
    seen: dict[str, dict[int, Any]] = {}
    original = Trainer.step

    def stepping(self: Trainer, batch: EncodedBatch) -> dict[str, Any]:
        values = [batch.latents.tolist(), batch.text_states.tolist(), list(batch.captions)]
        seen.setdefault(name, {})[batch.step] = values
        return original(self, batch)

    monkeypatch.setattr(Trainer, "step", stepping)
    name = "changed"
    assert do([*old, "--name", name, "--trainer.steps", str(CHANGED)]) == 0
    assert do([*argv, "--name", name, "--resume_changed"]) == 0
    name = "new"
    assert do([*argv, "--name", name, "--data.cache_dir", str(tmp_path / "empty")]) == 0
    assert [seen["changed"][step] for step in after] == [seen["new"][step] for step in after]
    captions = {caption for step in after for caption in seen["changed"][step][2]}
    assert "a mended caption" in captions and seen["changed"][0] != seen["new"][0]


@pytest.mark.slow
def test_two_ranks_are_the_same_after_a_kill(tmp_path: Path) -> None:
    base = [*tiny_settings(tmp_path), "--checkpoint.asynchronous", "false"]
    base += ["--data.buckets", json.dumps([dict(num_frames=4, height=8, width=8, fps=8, batch_size=4)])]
    assert do([*base, "--trainer.steps", str(CHANGED)]) == 0
    straight, killed = copy(tmp_path, "straight"), copy(tmp_path, "killed")
    argv = [*base, "--data.manifest", str(mend(tmp_path / "clips")), "--trainer.steps", str(LAST)]
    assert launch("train.py", 2, [*argv, "--name", "straight", "--resume_changed"])[0] == 0
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, runpy\n"
        "from stdit.training.trainer import Trainer\n"
        "original = Trainer.step\n"
        "Trainer.step = lambda self, batch: os.kill(os.getpid(), 9) if batch.step == 7 else original(self, batch)\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    code, output, _ = launch(str(script), 2, [*argv, "--name", "killed", "--resume_changed"])
    assert code != 0 and output.count("resumed from step 4 ") == 1
    code, output, errors = launch("train.py", 2, [*argv, "--name", "killed"])
    assert code == 0, errors
    assert output.count(f"resumed from step 6 ({killed}/checkpoints/step-00000006)\n") == 1
    assert numbers(straight) == numbers(killed) and len(numbers(killed)) == LAST
    first, second = (tensors(run / "checkpoints" / "step-00000008") for run in (straight, killed))
    assert first == second and {part for part, _ in first} == {"model", "ema", "optimizer"}


def tensors(checkpoint: Path) -> dict[tuple[str, str], bytes]:
    """Return the bytes of weights, averages and optimizer state, by part and name, whichever rank wrote them."""
    return {
        (path.parent.name, name): array.tobytes()
        for path in checkpoint.rglob("*.safetensors")
        for name, array in load_file(path).items()
    }


def test_the_lineage_is_in_every_video(changed: Callable[..., list[str]], tmp_path: Path) -> None:
    prompts = {"validation__prompts": '["a red square"]', "validation__num_inference_steps": 1}
    assert do(changed(resume_changed=True, **prompts)) == 0
    run = tmp_path / "outputs" / "tiny"
    (entry,) = json.loads((run / "pipeline" / "model_index.json").read_text())["lineage"]
    assert entry["step"] == CHANGED and "; ".join(entry["changes"]) == WORDS
    for source in (run, run / "checkpoints" / "step-00000006"):
        output = tmp_path / source.name
        flags = ["--num_inference_steps", "1", "--format", "[mp4, gif]", "--output", str(output)]
        result = warm.run(["sample.py", "--checkpoint", str(source), "--prompt", "a", *flags])
        assert result.returncode == 0, result.stderr
        files = {path.suffix: path for path in output.iterdir()}
        assert json.loads(files[".json"].read_text())["lineage"] == [entry]
        assert read_metadata(files[".mp4"])["lineage"] == read_metadata(files[".gif"])["lineage"] == [entry]
    assert read_metadata(run / "samples" / "step-00000008" / "00-a-red-square.mp4")["lineage"] == [entry]


def test_what_cannot_change_says_why_and_what_to_do(
    changed: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "outputs" / "tiny"
    for flags, words in (
        ({"model__depth": 2}, "model.depth 1 -> 2 (its weights are of another architecture)"),
        (
            {"codec__name": "pca", "codec__channels": 3},
            "codec.name pixel -> pca (its weights were trained on the",
        ),
        (
            {"text_encoder__max_length": 9},
            "text_encoder.max_length 12 -> 9 (its weights were trained with another",
        ),
        (
            {"optimizer__name": "adamw"},
            "optimizer.name muon -> adamw (its state is that of another optimizer)",
        ),
        (
            {"flow__prediction": "sample"},
            "flow.prediction velocity -> sample (the output of its weights has another",
        ),
    ):
        with pytest.raises(UserError) as refused:
            do(changed(resume_changed=True, **flags))
        assert words in str(refused.value) and f"--init_from {run}/checkpoints/step-00000004" in str(
            refused.value
        )
    assert len(metrics(run)) == CHANGED
    weights = run / "checkpoints" / "step-00000004"
    assert do(changed(name="new", optimizer__name="adamw", init_from=weights, trainer__steps=1)) == 0


def test_another_objective_reaches_the_scheduler_of_later_checkpoints(
    changed: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "outputs" / "tiny"
    objective = {"flow__shift": 2.0, "flow__conditioning__first": 0.1}
    assert do(changed(resume_changed=True, checkpoint__keep_last=9, **objective)) == 0
    for source in (run / "checkpoints" / "step-00000008", run / "pipeline"):
        pipe = load_pipeline(source)[0]
        assert pipe.flow.config.shift == 2.0
        assert pipe.config["lineage"][0]["changes"][-3:] == [
            "flow.shift 1.0 -> 2.0", "flow.conditioning.first 0.3 -> 0.1", "optimizer.lr 0.001 -> 0.0005"
        ]  # fmt: skip
    earlier = load_pipeline(run / "checkpoints" / f"step-0000000{CHANGED}")[0]
    assert earlier.flow.config.shift == 1.0 and earlier.config["lineage"] is None


def test_steps_that_a_spike_excluded_are_trained_on_if_their_batches_are_others(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        state = {"excluded_steps": [1, 5], "spikes": 1, "history": []}
        patch.setattr(SpikeGuard, "state", lambda guard: state)
        assert do(settings(trainer__steps=CHANGED)) == 0
    for name, flags, excluded in (
        ("slower", {"optimizer__lr": 5e-4}, [5]),
        ("mended", {"data__manifest": mend(tmp_path / "clips")}, []),
    ):
        run = copy(tmp_path, name)
        assert do(settings(name=name, resume_changed=True, **flags)) == 0
        assert [line["step"] for line in metrics(run) if line.get("excluded")] == excluded


def test_a_finished_run_says_how_many_steps_it_has(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert do(settings(trainer__steps=4)) == 0
    assert "resumed from" not in capsys.readouterr().out
    run = tmp_path / "outputs" / "tiny"
    shutil.rmtree(run / "pipeline")
    result = command(settings(trainer__steps=3))
    assert (result.returncode, result.stderr.count("error")) == (0, 0)
    assert f"resumed from step 4 ({run}/checkpoints/step-00000004)\n" in result.stdout
    assert f"{run} has 4 steps already, and trainer.steps = 3: nothing to train." in result.stdout
    assert "trained for" not in result.stdout
    assert f"python sample.py --checkpoint {run} --prompt" in result.stdout
    assert load_pipeline(run / "pipeline")[0].config["step"] == 4
    assert do(settings(trainer__steps=4)) == 0
    assert "trained for 4 steps" in capsys.readouterr().out
