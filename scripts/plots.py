"""Pictures of benchmarks, for which matplotlib must be installed."""

from typing import Any

from stdit.errors import install_command


def empty_figure(width: float, height: float) -> Any:
    """Return a figure of this size in inches; without matplotlib, say so and return None."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"--plot: skipped: matplotlib is not installed: {install_command('plot')}")
        return None
    return Figure(figsize=(width, height), layout="constrained")
