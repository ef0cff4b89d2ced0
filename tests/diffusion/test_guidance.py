import pytest
import torch

from stdit.diffusion.guidance import GUIDANCE_SCHEDULES, rescale_guidance, sample_moments, standard_deviation

SIGMAS = [i / 100 for i in range(100, 0, -1)]


def scales(name: str, interval: tuple[float, float] = (0.0, 1.0)) -> list[float]:
    return [GUIDANCE_SCHEDULES[name](5.0, sigma, step, interval) for step, sigma in enumerate(SIGMAS)]


def test_constant() -> None:
    assert set(scales("constant")) == {5.0}


def test_linear_rises_from_no_guidance_and_averages_to_the_scale() -> None:
    found = scales("linear")
    assert found[0] == 1 and found == sorted(found)
    assert sum(found) / len(found) == pytest.approx(5, abs=0.05)


def test_interval_guides_only_inside_the_interval() -> None:
    for sigma, scale in zip(SIGMAS, scales("interval", (0.25, 0.75)), strict=True):
        assert scale == (5.0 if 0.25 <= sigma <= 0.75 else 1.0)


def test_oscillating_guides_every_second_step() -> None:
    assert scales("oscillating")[:4] == [5.0, 1.0, 5.0, 1.0]


def test_spread_is_the_same_from_parts() -> None:
    x = torch.randn(2, 3, 5, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    expected = x.double().flatten(1).std(1, correction=0)
    torch.testing.assert_close(standard_deviation(sample_moments(x)), expected)
    torch.testing.assert_close(
        standard_deviation(sample_moments(x[:, :, :2]) + sample_moments(x[:, :, 2:])), expected
    )
    doubled = rescale_guidance(x, 2 * expected, expected, 1.0)
    torch.testing.assert_close(doubled, 2 * x)
    assert torch.equal(rescale_guidance(x, 2 * expected, expected, 0.0), x)
