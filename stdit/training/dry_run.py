"""``--dry_run``: what a run would train on, its memory and, if asked, the time of its steps."""

from stdit.training.config import TrainConfig


def dry_run(config: TrainConfig) -> int:
    """Print the report of a run on the main process; return the exit code."""
    from stdit.training.report import report_of
    from stdit.training.system import launched_processes

    rank, processes = launched_processes()
    if rank == 0:
        print(report_of(config, processes), flush=True)
    if config.dry_run != "steps":
        return 0
    from stdit.training.stop_signals import stop_signals

    with stop_signals() as signals:
        # It imports torch, while signals are handled already.
        from stdit.training.step_times import measured_times

        lines = measured_times(config, signals)
        if rank == 0:
            print(*lines, sep="\n")
        return 0
    return signals.exit_code
