from types import SimpleNamespace

import pytest

from stdit.data.batch import Timings
from stdit.data.config import DataConfig
from stdit.training import data_stalls
from stdit.training.data_stalls import StallWindow, advice, timed_batches


def config(**values):
    return DataConfig(manifest="m.csv", **values)


@pytest.mark.parametrize(
    ("window", "settings", "words"),
    [
        (
            StallWindow(40, Timings(60, reading=5, encoding=50), 10),
            {},
            ["60%", "encoding takes 5 s", "data.cache disk"],
        ),
        (
            StallWindow(40, Timings(60, reading=5, encoding=50), 10),
            {"cache": "disk"},
            ["cache lacks clips", "prepare_data.py encode"],
        ),
        (
            StallWindow(70, Timings(30, 100, 20, 0), 10),
            {"workers": 2},
            ["30%", "80% is waiting for a slow disk", "faster disk"],
        ),
        (
            StallWindow(70, Timings(30, 200, 190, 0), 10),
            {"workers": 1},
            ["20 s, and a step 7 s", "data.workers = 1", "set it to 3"],
        ),
        (
            StallWindow(10, Timings(90, 100, 95, 0), 10),
            {},
            ["10 workers would be needed", "4 cores", "data.cache disk"],
        ),
        (StallWindow(70, Timings(30, 60, 55, 0), 10), {"workers": 2}, ["2 loader processes are fast enough"]),
    ],
)
def test_the_cause_and_the_way_out_are_named(window, settings, words):
    said = advice(window, config(**settings), cores=4)
    assert all(word in said for word in words), said


def run(monkeypatch, steps, wait, train, warns=True):
    """Take steps that last the given seconds by a fake clock; return the timed batches."""
    now = [100.0]
    monkeypatch.setattr(data_stalls.time, "perf_counter", lambda: now[0])

    def batches():
        for step in range(steps):
            now[0] += wait
            yield SimpleNamespace(step=step, timings=Timings(reading=wait, computing=wait))

    seen = []
    for batch in timed_batches(batches(), config(), warns):
        now[0] += train
        seen.append(batch)
    return seen


def test_warnings_are_rare_and_only_about_long_waits(monkeypatch, caplog):
    seen = run(monkeypatch, 1000, wait=1.0, train=1.0)
    assert [batch.step for batch in seen] == list(range(1000))
    assert {batch.timings.waiting for batch in seen} == {1.0}
    assert caplog.text.count("training waits for data 50% of the time") == 3  # in 2000 s, every 900
    caplog.clear()
    run(monkeypatch, 1000, wait=0.1, train=1.0)
    run(monkeypatch, 1000, wait=1.0, train=1.0, warns=False)
    run(monkeypatch, 9, wait=100.0, train=1.0)  # the first batches may take their time
    assert not caplog.text


def test_the_share_is_of_all_time():
    assert StallWindow(3, Timings(waiting=1)).share == 0.25 and StallWindow().share == 0
