"""The names that stdit.pipelines exports, and that its settings import no torch."""

import subprocess
import sys

import stdit.pipelines


def test_every_name_can_be_imported() -> None:
    for name in stdit.pipelines.__all__:
        assert getattr(stdit.pipelines, name).__name__ == name


def test_settings_requests_and_writer_import_no_torch() -> None:
    program = (
        "import sys\n"
        "from stdit.pipelines import Request, SampleConfig, VideoWriter, plan_requests, sample_to_files\n"
        "assert plan_requests(SampleConfig(prompt='a'))[0].prompt == 'a'\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
