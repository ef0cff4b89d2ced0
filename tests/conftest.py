"""Order of the test files: those that take longest first, so that all cores are busy until the end.

And Ctrl-C is on, also if a shell started the tests in the background, for which it turns it off.
"""

import signal

import pytest

LONGEST = [
    "tests/training/test_trainer_on_ranks.py",
    "tests/parallel/sequence/test_sharding.py",
    "tests/test_train_on_ranks.py",
    "tests/pipelines/test_pipeline_on_ranks.py",
    "tests/test_train.py",
    "tests/models/test_golden.py",
    "tests/models/test_stdit.py",
    "tests/parallel/processes/test_watchdog.py",
    "tests/scripts/bench/test_baselines.py",
    "tests/parallel/sequence/test_planner.py",
    "tests/scripts/test_prepare_data.py",
    "tests/test_pages.py",
    "tests/serve/test_server.py",
    "tests/serve/test_page.py",
]


def pytest_configure() -> None:
    """Let the processes that tests start inherit that Ctrl-C interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the tests of the slowest files to the front."""
    rank = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(LONGEST)))
