from typing import Any

from hypothesis import HealthCheck, settings

checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
settings.register_profile(
    "short", max_examples=40, derandomize=True, database=None, deadline=None, suppress_health_check=checks
)
settings.register_profile(
    "long", max_examples=21_000, database=None, deadline=None, suppress_health_check=checks
)
settings.load_profile("short")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many inputs each reader was given."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name == "inputs":
                terminalreporter.write_line(f"{report.nodeid.partition('[')[2][:-1]}: {value}")
