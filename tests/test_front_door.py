"""The names that packages export, and what importing them costs."""

import subprocess
import sys

import pytest

PACKAGES = {
    "stdit": ["STDiT", "STDiTPipeline", "RectifiedFlow", "__version__"],
    "stdit.models": ["STDiT", "STDiTConfig"],
    "stdit.diffusion": [
        "FlowConfig",
        "FlowObjective",
        "RectifiedFlow",
        "register_mask_strategy",
        "register_prediction",
    ],
    "stdit.codecs": [
        *(
            "VideoCodec",
            "TextEncoder",
            "CodecConfig",
            "TextEncoderConfig",
            "build_codec",
            "build_text_encoder",
        ),
        *("register_codec", "register_diffusers_vae", "register_text_encoder"),
    ],
    "stdit.data": ["build_plan", "video_loader", "DataConfig"],
    "stdit.parallel": ["Mesh", "TokenSharding", "Watchdog", "build_mesh"],
    "stdit.training": ["Session", "TrainConfig", "start"],
}
LIGHT = [
    *PACKAGES,
    "stdit.pipelines",
    *(
        f"stdit.{package}.config"
        for package in "models codecs diffusion data data.manifest parallel pipelines training".split()
    ),
    "stdit.training.stop_signals",
    "stdit.registry",
    "stdit.cli",
    "stdit.settings",
]


@pytest.mark.parametrize("package", PACKAGES)
def test_exported_names_exist(package: str) -> None:
    module = __import__(package, fromlist=["_"])
    assert set(PACKAGES[package]) <= set(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_importing_packages_and_configs_imports_no_torch() -> None:
    program = f"import sys, {', '.join(LIGHT)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "diffusers", "transformers"} & set(done.stdout.split())


def test_importing_stdit_is_quick() -> None:
    """Measure the processor time of the import, the least of three calls, so that other load does not count."""
    program = "import time; start = time.process_time(); import stdit; print(time.process_time() - start)"
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        for _ in "123"
    ]
    assert min(float(done.stdout) for done in runs) < 0.05
