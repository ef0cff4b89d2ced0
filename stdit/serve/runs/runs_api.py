"""Routes of runs and of what is started from the page: ``/v1/runs``, ``/v1/configs``, ``/v1/launches``."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Body, Path, Query
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field

from stdit.serve.runs.launch_processes import Launch
from stdit.serve.runs.launches import OVERRIDES, Launches
from stdit.serve.runs.runs import RunCurves, RunDetails, Runs, RunSummary, ValidationVideos
from stdit.serve.runs.training_configs import TrainingConfigSummary

RunName = Annotated[str, Path(max_length=200)]


@dataclass(frozen=True)
class RunList:
    """The runs of the folder, those that changed last first."""

    data: list[RunSummary]


@dataclass(frozen=True)
class TrainingConfigs:
    """The configs that come with stdit."""

    data: list[TrainingConfigSummary]
    overrides: dict[str, str]
    """Settings that the page may change, and what each is."""
    allow_training: bool
    """Whether anything can be started here."""


class LaunchOrder(BaseModel):
    """A training to start, or to report on."""

    model_config = ConfigDict(extra="forbid", strict=True)

    config: str = Field(max_length=200)
    """One of ``/v1/configs``."""
    name: str = Field(max_length=200)
    """Of the new run."""
    steps: int | None = None
    """Short for the override ``trainer.steps``."""
    overrides: dict[str, int | float | str] = Field(default_factory=dict, max_length=20)
    """Settings of the short list, see ``/v1/configs``."""
    dry_run: bool = False
    """Only report what it would train on, its memory and time."""


class ResumeOrder(BaseModel):
    """How far to train a run."""

    model_config = ConfigDict(extra="forbid", strict=True)

    steps: int | None = None
    """Of the whole run; none: as in its config."""


def runs_routes(runs: Runs, launches: Launches) -> APIRouter:
    """Return the routes of runs. They read files, so that each runs in a thread of its own."""
    routes = APIRouter(prefix="/v1", tags=["runs"])

    @routes.get("/runs")
    def list_runs() -> RunList:
        """List the runs in the folder of runs."""
        return RunList(runs.summaries())

    @routes.get("/runs/{name}")
    def run_details(name: RunName) -> RunDetails:
        """Return a run with its checkpoints and settings."""
        return runs.details(name)

    @routes.get("/runs/{name}/metrics")
    def run_metrics(
        name: RunName,
        fields: Annotated[
            str | None, Query(max_length=2000, description="Names, separated by commas")
        ] = None,
        points: Annotated[int, Query(ge=1, le=2000)] = 400,
        after: Annotated[int, Query(ge=-1, lt=2**63)] = -1,
    ) -> RunCurves:
        """Return curves of a run, at most ``points`` buckets each, that end after a step."""
        names = None if fields is None else [field for field in fields.split(",") if field]
        return runs.curves(name, names, points, after)

    @routes.get("/runs/{name}/samples")
    def run_samples(name: RunName) -> ValidationVideos:
        """List the validation videos of a run."""
        return runs.samples(name)

    @routes.get(
        "/runs/{name}/samples/{step}/{file}",
        response_class=FileResponse,
        responses={200: {"content": {"video/mp4": {}}}},
    )
    def run_sample(
        name: RunName,
        step: Annotated[int, Path(ge=0, lt=2**63)],
        file: Annotated[str, Path(max_length=255)],
    ) -> FileResponse:
        """Return a validation video, or the range of it that the header Range names."""
        return FileResponse(runs.sample_file(name, step, file), media_type="video/mp4")

    @routes.post("/runs/{name}/stop")
    def stop_run(name: RunName) -> RunSummary:
        """Let a training on this machine save a checkpoint after its step, and end."""
        launches.stop(name)
        return runs.summary(name)

    @routes.post("/runs/{name}/resume")
    def resume_run(name: RunName, order: Annotated[ResumeOrder | None, Body()] = None) -> Launch:
        """Resume a run from its newest whole checkpoint."""
        return launches.resume(name, None if order is None else order.steps)

    @routes.get("/configs")
    def list_configs() -> TrainingConfigs:
        """List the configs for training that come with stdit."""
        return TrainingConfigs(launches.configs(), OVERRIDES, launches.allow_training)

    @routes.post("/launches")
    def launch(order: LaunchOrder) -> Launch:
        """Start a training, or a dry run, as a process of its own: ``/v1/launches/{id}`` says what became of it."""
        steps = {} if order.steps is None else {"trainer.steps": order.steps}
        return launches.start(order.config, order.name, {**order.overrides, **steps}, order.dry_run)

    @routes.get("/launches/{id}")
    def launch_state(id: Annotated[str, Path(max_length=100)]) -> Launch:
        """Return what became of a training or dry run that was started here, and what it has printed."""
        return launches.state(id)

    return routes
