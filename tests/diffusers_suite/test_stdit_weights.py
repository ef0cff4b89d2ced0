"""diffusers' shared tests of quantised models and of single files, of models in a folder, not of the hub."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.diffusers_suite.loading import define, with_layer_names
from tests.diffusers_suite.test_stdit_model import LAYERS, STDiTConfig, WanConfig, suite

quantised_stdit = with_layer_names("models.testing_utils.quantization", LAYERS)


class InFolder:
    """The model's folder, written once per class."""

    folder: Path

    @pytest.fixture(autouse=True, scope="class")
    def _model_folder(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
        cls = request.cls
        cls.folder = tmp_path_factory.mktemp("model")
        torch.manual_seed(0)
        tested = cls()
        tested.model_class(**tested.get_init_dict()).save_pretrained(cls.folder)

    @property
    def pretrained_model_name_or_path(self) -> str:
        return str(self.folder)


class SingleFile:
    """The file in the folder; settings that no shape tells have their defaults."""

    folder: Path

    @property
    def ckpt_path(self) -> str:
        return str(self.folder / "diffusion_pytorch_model.safetensors")

    def get_init_dict(self) -> dict[str, Any]:
        settings: dict[str, Any] = super().get_init_dict()  # type: ignore[misc]
        del settings["gate_init"]
        return settings

    def get_dummy_single_file_state_dict(self) -> dict[str, Any]:
        return {name: tensor.to("meta") for name, tensor in load_file(self.ckpt_path).items()}


CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "STDiT": (STDiTConfig, {}),
    "STDiTWithSigma": (STDiTConfig, {"pred_sigma": True}),
    "Wan": (WanConfig, {}),
}
MIXINS: dict[str, dict[str, Any]] = {
    "TorchAoTesterMixin": {"torch_dtype": torch.bfloat16},  # in which diffusers loads a model for torchao
    "QuantoTesterMixin": {},
}
for _config, (_base, _settings) in CONFIGS.items():
    _where = quantised_stdit if _base is STDiTConfig else suite
    _last = {"modules_to_not_convert_for_test": ["qkv" if _base is STDiTConfig else "proj_out"]}
    for _mixin, _attributes in MIXINS.items():
        _name = f"Test{_config}{_mixin.removesuffix('TesterMixin')}"
        define(
            globals(), _name, InFolder, _base, getattr(_where, _mixin), **_settings, **_attributes, **_last
        )
    if _base is STDiTConfig:  # for Wan's, diffusers asks the hub for a config
        define(
            globals(),
            f"Test{_config}SingleFile",
            InFolder,
            SingleFile,
            _base,
            suite.SingleFileTesterMixin,
            **_settings,
        )
