"""Start, stop and resume trainings for the page. Imports no torch.

Only configs that come with stdit can be started, and runs of the folder resumed, with a short list of settings, each
checked by type: nothing in a request names a file or a module. A training is a process of its own session, without a
shell, that outlives the server; its output goes to ``NAME.log`` beside the run folder, which must not exist before
the training makes it.
"""

import os
import re
import shlex
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stdit.errors import UserError
from stdit.named_configs import named_configs
from stdit.serve.errors import RequestError
from stdit.serve.json_values import finite_number, whole_number, whole_text
from stdit.serve.runs.launch_processes import Launch, LaunchProcesses
from stdit.serve.runs.run_files import CONFIG, is_run_name
from stdit.serve.runs.run_locks import is_training, query_lock
from stdit.serve.runs.runs import Runs
from stdit.serve.runs.training_configs import TrainingConfigSummary, summary_of_config

_WHOLE, _NUMBER, _RUN = "whole number", "number", "run"
OVERRIDES = {
    "trainer.steps": _WHOLE,
    "seed": _WHOLE,
    "optimizer.lr": _NUMBER,
    "optimizer.muon_lr": _NUMBER,
    "optimizer.warmup_steps": _WHOLE,
    "trainer.micro_batch_size": _WHOLE,
    "data.batch_multiplier": _WHOLE,
    "checkpoint.every": _WHOLE,
    "validation.every": _WHOLE,
    "validation.loss_every": _WHOLE,
    "init_from": _RUN,
}
"""Settings that the page may change, and what they are; a run is the name of one in the folder."""
_FIRST = ("train/own-clips", "train/quickstart")
"""Configs that people begin with."""
_NEW_NAME = re.compile(r"[^\W_][\w.+-]{0,99}")
_WAYS = (
    "touch {file} on any machine that shares the disk: the run saves a checkpoint after its step, and ends"
)


class Launches:
    """Trainings and dry runs that the page starts.

    Args:
        runs: of the folder in which they train.
        allow_training: whether the page may start and stop anything.
    """

    def __init__(self, runs: Runs, allow_training: bool = True) -> None:
        self.runs, self.allow_training = runs, allow_training
        self.processes = LaunchProcesses()
        self._lock = threading.Lock()

    def configs(self) -> list[TrainingConfigSummary]:
        """Return the configs that can be started."""
        return [summary_of_config(name, file) for name, file in _offered().items()]

    def start(self, config: str, name: str, overrides: Mapping[str, Any], dry_run: bool) -> Launch:
        """Start a training, or a dry run of a few steps, and return at once.

        Args:
            config: one of `configs`.
            name: of the new run.
            overrides: settings in `OVERRIDES`.

        Raises:
            RequestError: if that is not allowed, a setting is wrong, the run exists, or too many are running.
        """
        self._check_allowed()
        file = _offered().get(config)
        if file is None:
            raise RequestError(
                f"config = {whole_text(config)[:80]!r}: is none of those that the page can start: choose one of "
                f"{', '.join(_offered())}.",
                param="config",
            )
        if not _NEW_NAME.fullmatch(name):
            raise RequestError(
                f"name = {whole_text(name)[:80]!r}: must be a folder name of at most 100 letters, digits, dots, "
                "dashes and underscores that begins with a letter or digit, such as my-run.",
                param="name",
            )
        if os.path.lexists(self.runs.root / name):
            raise RequestError(
                f"name = {name!r}: there is such a run already: resume it, or choose another name.",
                status=409,
                param="name",
                code="exists",
            )
        flags = [f"--{key}={self._value(key, value)}" for key, value in overrides.items()]
        return self._launch(file, config, name, flags, dry_run)

    def resume(self, name: str, steps: int | None = None) -> Launch:
        """Resume a run from its newest whole checkpoint.

        Args:
            steps: of the whole run; None: as in its config.

        Raises:
            RequestError: if that is not allowed, there is no such run, it is running or finished.
        """
        self._check_allowed()
        run = self.runs.summary(name)
        if run.state in ("running", "unknown"):
            what = "is running" if run.state == "running" else "may be running on another machine"
            raise RequestError(f"run {name} {what}: stop it first.", status=409, code="running")
        if run.problem is not None:
            raise RequestError(
                f"run {name} cannot be resumed from here: {run.problem}: use the command that began it.",
                status=409,
                code="no_config",
            )
        if run.state == "finished" and (steps is None or steps <= run.step):
            raise RequestError(
                f"run {name} is finished: it has done {run.step} steps: give more steps, such as {2 * run.step}.",
                status=409,
                param="steps",
                code="finished",
            )
        flags = [] if steps is None else [f"--trainer.steps={self._value('trainer.steps', steps)}"]
        file = self.runs.given / name / CONFIG
        return self._launch(file, str(file), name, [*flags, "--resume=auto", "--dry_run=false"], False)

    def stop(self, name: str) -> None:
        """Ask the process that trains in a run to save a checkpoint after its step, and end.

        Raises:
            RequestError: if that is not allowed, or no process of this machine surely trains there.
        """
        import psutil

        self._check_allowed()
        folder = self.runs.folder(name)
        lock = query_lock(folder)
        way_out = _WAYS.format(file=self.runs.given / name / "stop")
        if lock.held is False:
            raise _not_stopped(f"run {name}: no process trains there.")
        if lock.held is None:
            raise _not_stopped(
                f"run {name}: whether a process trains there is not seen from here: {way_out}."
            )
        if not lock.is_here:
            where = f"is trained on {whole_text(lock.host or 'a machine that is not known')}"
            raise _not_stopped(f"run {name} {where}, and this is another one: {way_out}.")
        if lock.pid is None:
            raise _not_stopped(
                f"run {name}: its process is not seen from here: it has just started, or is in a container: try "
                f"again in a second, or {way_out}."
            )
        try:
            process = psutil.Process(lock.pid)
            if not is_training(process.cmdline()):
                raise _not_stopped(
                    f"run {name} is locked by process {lock.pid}, whose command is not that of a training: {way_out}."
                )
            if query_lock(folder) != lock:
                raise _not_stopped(f"run {name} has changed hands at this moment: try again.")
            process.terminate()  # only if the process is still the same
        except psutil.NoSuchProcess:
            raise _not_stopped(
                f"run {name}: its process {lock.pid} has ended, or is in a container: {way_out}."
            ) from None
        except psutil.AccessDenied:
            raise _not_stopped(
                f"run {name} is trained by another user (process {lock.pid}): {way_out}."
            ) from None

    def state(self, id: str) -> Launch:
        """Return what became of a launch. Raises RequestError (404) if it is not known, or no longer."""
        return self.processes.state(id)

    def close(self) -> None:
        """End the dry runs; trainings go on."""
        self.processes.close()

    def _launch(self, file: Path, shown: str, name: str, flags: list[str], dry_run: bool) -> Launch:
        """Check all settings as the command does, and start it."""
        place = [f"--output_dir={self.runs.given}", f"--name={name}"]
        flags = [*flags, *(["--dry_run=steps"] if dry_run else [])]
        command = shlex.join(["python", "train.py", "--config", shown, *place, *flags])
        arguments = ["--config", str(file), *place, *flags]
        with self._lock:
            _check_settings(arguments)
            if dry_run:
                return self.processes.start_dry_run(arguments, command, name)
            return self.processes.start_training(arguments, command, name, self.runs.root / f"{name}.log")

    def _value(self, key: str, value: Any) -> str:
        """Return the value of an override as a flag has it. Raises RequestError for a wrong type or range."""
        param, kind = f"overrides.{whole_text(key)[:80]}", OVERRIDES.get(key)
        if kind is None:
            raise RequestError(
                f"{whole_text(key)[:80]} cannot be set from the page, only {', '.join(OVERRIDES)}: use the command "
                "line for others.",
                param=param,
            )
        if kind == _WHOLE:
            number = whole_number(value)
            if number is None or number < 0:
                raise RequestError(f"{key} = {_shown(value)}: must be a whole number from 0 on.", param=param)
            return str(number)
        if kind == _NUMBER:
            real = None if isinstance(value, bool) else finite_number(value)
            if real is None:
                raise RequestError(f"{key} = {_shown(value)}: must be a number.", param=param)
            return repr(real)
        if not isinstance(value, str) or not is_run_name(value):
            raise RequestError(
                f"{key} = {_shown(value)}: must be the name of a run in the folder.", param=param
            )
        return str(self.runs.given / self.runs.folder(value).name)

    def _check_allowed(self) -> None:
        if not self.allow_training:
            raise RequestError(
                "this server does not start or stop trainings: start it with --server.allow_training true, or use "
                "train.py.",
                status=403,
                code="training_not_allowed",
            )


def _check_settings(arguments: Sequence[str]) -> None:
    """Parse settings as train.py does. Raises RequestError with its words, and the field if it is one."""
    from stdit.training.config import parse_train

    try:
        parse_train(arguments)
    except UserError as error:
        found = re.match(r"(?:--config \S+: )?([\w.]+) = ", str(error))
        key = found[1] if found else ""
        param = f"overrides.{key}" if key in OVERRIDES else key if key == "name" else None
        raise RequestError(str(error), param=param) from None


def _offered() -> dict[str, Path]:
    """Return the configs for training by name, those to begin with first."""
    found = {name: file for name, file in named_configs().items() if name.startswith("train/")}
    return dict(sorted(found.items(), key=lambda item: (item[0] not in _FIRST, item[0])))


def _not_stopped(message: str) -> RequestError:
    return RequestError(message, status=409, code="not_stopped")


def _shown(value: Any) -> str:
    return whole_text(repr(value)[:80])
