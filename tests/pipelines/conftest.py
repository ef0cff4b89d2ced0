import pytest

from tests.pipelines.tiny import tiny_pipeline


@pytest.fixture(scope="session")
def pipe(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("pipe"))
