import pytest

import stdit.training.data_stalls as waiting
from stdit.data.config import DataConfig
from stdit.training.data_stalls import Spent, advice, watched


def config(**values):
    return DataConfig(manifest="m.csv", **values)


@pytest.mark.parametrize(
    ("spent", "settings", "words"),
    [
        (
            Spent(60, 40, encoding=50, reading=5, steps=10),
            {},
            ["60%", "encoding takes 5 s", "data.cache disk"],
        ),
        (Spent(60, 40, 50, 5, steps=10), {"cache": "disk"}, ["cache lacks clips", "prepare_data.py encode"]),
        (
            Spent(30, 70, 0, 100, 20, 10),
            {"workers": 2},
            ["30%", "80% is waiting for a slow disk", "faster disk"],
        ),
        (
            Spent(30, 70, 0, 200, 190, 10),
            {"workers": 1},
            ["20 s, and a step 7 s", "data.workers = 1", "set it to 3"],
        ),
        (Spent(90, 10, 0, 100, 95, 10), {}, ["10 workers would be needed", "4 cores", "data.cache disk"]),
        (Spent(30, 70, 0, 60, 55, 10), {"workers": 2}, ["2 loader processes are fast enough"]),
    ],
)
def test_the_cause_and_the_way_out_are_named(spent, settings, words):
    said = advice(spent, config(**settings), cores=4)
    assert all(word in said for word in words), said


def run(monkeypatch, steps, wait, train, speaks=True):
    """Steps of so many seconds each, of a clock that stands still otherwise; returns what the batches became."""
    now = [100.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])

    def batches():
        for step in range(steps):
            now[0] += wait
            yield {"step": step, "spent": (wait, wait), "encoding": 0.0}

    seen = []
    for batch in watched(batches(), config(), speaks):
        now[0] += train
        seen.append(batch)
    return seen


def test_it_warns_once_in_a_while_and_not_of_a_short_wait(monkeypatch, caplog):
    seen = run(monkeypatch, 1000, wait=1.0, train=1.0)
    assert seen == [{"step": step} for step in range(1000)]
    assert caplog.text.count("training waits for data 50% of the time") == 3  # in 2000 s, every 900
    caplog.clear()
    run(monkeypatch, 1000, wait=0.1, train=1.0)
    run(monkeypatch, 1000, wait=1.0, train=1.0, speaks=False)
    run(monkeypatch, 9, wait=100.0, train=1.0)  # the first batches may take their time
    assert not caplog.text


def test_the_share_is_of_all_time():
    assert Spent(waiting=1, training=3).share == 0.25 and Spent().share == 0
