"""Security: no file runs code or leaves its root, no key is written, and file modes respect the umask.

Pickles that are planted in checkpoints, weights and codecs are in tests/training/test_checkpoint_writer.py,
tests/models/test_opensora.py, tests/codecs/test_transformers_text.py and tests/codecs/test_diffusers_vae.py.
"""

import ast
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest

from stdit.errors import UserError
from stdit.pipelines.loading import load_pipeline
from tests.test_train import Settings, do, settings  # noqa: F401

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted((ROOT / "stdit").rglob("*.py")), *sorted((ROOT / "scripts").glob("*.py"))]
SOURCES += [ROOT / "train.py", ROOT / "sample.py"]
FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "joblib.load",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system", "os.popen", "numpy.fromfile",
    "tempfile.mktemp",
}  # fmt: skip


def calls(path: Path) -> list[tuple[str, dict[str, Any], int]]:
    """Return every call in a file: dotted name, constant keyword arguments, and line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""
            given = {k.arg: getattr(k.value, "value", None) for k in node.keywords if k.arg}
            found.append((name, given, node.lineno))
    return found


def dangers(path: Path) -> list[str]:
    wrong = []
    for name, given, line in calls(path):
        last = name.rpartition(".")[2]
        bad = name in FORBIDDEN or last == "extractall"
        bad |= name.endswith("torch.load") and given.get("weights_only") is not True
        bad |= name in ("np.load", "numpy.load") and given.get("allow_pickle", False) is not False
        bad |= given.get("shell") is True or given.get("trust_remote_code") is True
        if bad:
            wrong.append(f"{path.name}:{line} {name}")
    return wrong


def test_no_source_reads_a_pickle_runs_a_shell_or_evaluates_text(tmp_path: Path) -> None:
    assert [danger for path in SOURCES for danger in dangers(path)] == []
    (tmp_path / "bad.py").write_text(
        "import pickle, os, torch, subprocess\npickle.load(f)\nos.system(x)\ntorch.load(f)\neval(x)\n"
        "subprocess.run(x, shell=True)\nmodel.from_pretrained(x, trust_remote_code=True)\n"
    )
    assert len(dangers(tmp_path / "bad.py")) == 6, "the test sees what it looks for"


class Planted:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_run_keeps_keys_out_of_files_and_output_and_respects_the_umask(
    settings: Settings,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    key = "f00dfeed" * 5
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("HF_TOKEN", f"hf_{key}")
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    before = os.umask(0o027)
    try:
        flags = {
            "validation__prompts": '["a"]',
            "validation__num_inference_steps": 1,
            "data__cache": "memory",
        }
        argv = settings(trainer__steps=2, tracker__name="wandb", tracker__mode="offline", **flags)
        assert do(argv) == 0
    finally:
        os.umask(before)
    import wandb

    wandb.teardown()
    run = tmp_path / "outputs"
    files = [path for path in run.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 15
    assert [path for path in files if key.encode() in path.read_bytes()] == []
    assert key not in "".join(capfd.readouterr())
    own = [path for path in files if "wandb" not in path.relative_to(run).parts]
    modes = {path.relative_to(run).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in own}
    assert {name: oct(mode) for name, mode in modes.items() if mode != 0o640} == {}

    mark = tmp_path / "mark"
    weights = next((run / "tiny" / "pipeline" / "transformer").glob("*.safetensors"))
    weights.unlink()
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pt", weights.name):
        (weights.parent / name).write_bytes(pickle.dumps(Planted(mark)))
    with pytest.raises((UserError, OSError)):
        load_pipeline(run / "tiny" / "pipeline")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Planted(mark)))
    assert mark.exists(), "the trap works"
