"""Marks, and the results: with ``RESULTS=FILE``, one line of JSON per test."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit.models.stdit import STDiT

MARKS = (
    "big_accelerator lora ip_adapter training attention memory cpu_offload group_offload compile single_file "
    "quantization bitsandbytes quanto torchao gguf autoround modelopt sdnq context_parallel tensor_parallel cache "
    "nightly"
).split()


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: of diffusers' tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def no_weight_is_zero() -> Iterator[None]:
    """A new STDiT gives zeros, from which no test could tell that a part of it was skipped."""
    initialize = STDiT.initialize_weights

    def initialize_and_add(model: STDiT) -> None:
        initialize(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.is_meta:
                    parameter += 0.1 * torch.randn_like(parameter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(STDiT, "initialize_weights", initialize_and_add)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """Append mixin, test and outcome to the file of results when the outcome is known."""
    report = yield
    ended = report.when == "call" or report.outcome != "passed" and report.when == "setup"
    if ended and (file := os.environ.get("RESULTS")) and item.cls is not None:
        mixin = next(one for one in item.cls.__mro__ if item.originalname in vars(one))
        if mixin is item.cls:  # a test of its own, or one that it adapts
            mixin = next((one for one in item.cls.__mro__[1:] if item.originalname in vars(one)), mixin)
        line = {
            "class": item.cls.__name__,
            "mixin": mixin.__name__,
            "test": item.name,
            "outcome": report.outcome,
        }
        with open(file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
    return report
