"""The server: page and API in one application, with the workers that make the videos."""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import stdit
from stdit.errors import UserError
from stdit.serve.api.events import EventStream
from stdit.serve.api.security import Guard
from stdit.serve.api.videos_api import VideoService, video_routes
from stdit.serve.config import SampleCommand
from stdit.serve.errors import RequestError, error_body
from stdit.serve.gallery.gallery import Gallery
from stdit.serve.gallery.gallery_api import gallery_routes
from stdit.serve.queue.catalog import Catalog
from stdit.serve.queue.health import HealthObject, health, metrics_registry
from stdit.serve.queue.jobs import JobStore
from stdit.serve.queue.paths import ServerPaths
from stdit.serve.queue.supervisor import Supervisor
from stdit.serve.runs.launches import Launches
from stdit.serve.runs.runs import Runs
from stdit.serve.runs.runs_api import runs_routes

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parents[1] / "page"


def build_app(config: SampleCommand, with_workers: bool = True) -> FastAPI:
    """Return the application of a server.

    Args:
        with_workers: start workers with it; False: jobs wait for the workers of somebody else.
    """
    paths = ServerPaths(
        state=config.state_folder,
        videos=config.videos_folder,
        runs=config.runs_folder,
        loras=None if config.server.loras is None else Path(config.server.loras),
        max_upload_bytes=int(config.server.max_upload_mib * 2**20),
    )
    store = JobStore(paths.jobs_file, durable=True)
    catalog = Catalog(paths.runs, config.checkpoint, paths.loras, config.ema)
    events = EventStream(store, config.server.keep_days)
    supervisor = Supervisor(config, paths, JobStore(paths.jobs_file))
    inside = paths.videos.resolve().is_relative_to(paths.runs.resolve())
    shown = paths.runs if inside else paths.videos
    gallery = Gallery(shown, paths.state / "gallery.sqlite", changes=store.completed_totals)
    runs = Runs(paths.runs)
    launches = Launches(runs, config.server.allow_training)
    service = VideoService(config, store, catalog, paths, events)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as ends:  # each happens, whether or not another one fails
            ends.callback(store.close)
            ends.callback(supervisor.store.close)
            if with_workers:
                supervisor.start()
                ends.callback(supervisor.stop)
                await run_in_threadpool(_import_pipelines)
            ends.callback(launches.close)
            ends.callback(gallery.close)
            ends.push_async_callback(events.wait_closed)
            yield

    app = FastAPI(
        title="stdit",
        version=stdit.__version__,
        lifespan=lifespan,
        summary="Videos from prompts",
        docs_url=None,
        redoc_url=None,
    )
    app.state.events = events
    app.include_router(video_routes(service), responses=_ERRORS)

    def forget(file: Path) -> None:
        """Forget the job of a video that was deleted in the gallery."""
        store.delete_file(os.path.relpath(file, paths.videos.resolve()))

    of_gallery = gallery_routes(gallery, lambda file: service.inspector.file(file).model_dump(), forget)
    app.include_router(of_gallery, responses=_ERRORS)
    app.include_router(runs_routes(runs, launches), responses=_ERRORS)

    @app.get("/health")
    def get_health() -> HealthObject:
        """Tell whether workers work, and how many videos wait."""
        return health(store)

    registry = metrics_registry(store)

    @app.get("/metrics", response_class=Response)
    def get_metrics() -> Response:
        """Send the numbers that Prometheus reads."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    def get_page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/static", StaticFiles(directory=PAGE), name="static")
    _explain_errors(app)
    app.add_middleware(_Head)
    app.add_middleware(_Unexpected)
    app.add_middleware(Guard, config=config.server)  # outside of all others: each answer gets its headers
    return app


def _import_pipelines() -> None:
    """Import what requests need, once: diffusers fails if two threads import it at the same time."""
    import stdit.pipelines.workload  # noqa: F401


_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "description": "The request cannot be followed, and why",
        "content": {"application/json": {"schema": _ERROR_SCHEMA}},
    }
}


def _answer(message: str, status: int, param: str | None = None, code: str = "invalid_value") -> JSONResponse:
    return JSONResponse(error_body(message, param, code, status), status)


class _Head:
    """ASGI middleware that answers HEAD as GET, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            is_body = message["type"] == "http.response.body"
            await send({**message, "body": b""} if is_body else message)

        await self.app({**scope, "method": "GET"}, receive, send_without_body)


class _Unexpected:
    """ASGI middleware that logs an error that nobody expected, and answers without any detail of it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, send_noting)
        except ClientDisconnect:
            pass  # nobody is there to be answered
        except Exception as error:
            if has_begun or scope["type"] != "http":
                raise  # uvicorn logs it, and breaks the connection
            logger.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            words = "something went wrong here: the output of the server says what."
            await _answer(words, 500, None, "server_error")(scope, receive, send)


def _explain_errors(app: FastAPI) -> None:
    """Answer each error of a request with its message."""

    @app.exception_handler(UserError)
    def of_user(request: Request, error: UserError) -> JSONResponse:
        if isinstance(error, RequestError):
            return _answer(str(error), error.status, error.param, error.error_code)
        return _answer(str(error), 400)

    @app.exception_handler(RequestValidationError)
    def of_schema(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1]) if first["loc"] else "request"
        if first["loc"][:1] == ("path",):  # a name or number that nothing can have
            return _answer(f"{name} = {first['input']!r:.80}: there is none.", 404, name, "not_found")
        return _answer(f"{name:.80}: {first['msg']}.", 400, name[:80])

    @app.exception_handler(HTTPException)
    def of_http(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed"}
        words = f"{error.detail.rstrip('.')}."
        if error.status_code == 400:  # of a form that cannot be read
            words = f"the request cannot be read ({error.detail.rstrip('.')}): send one form with one file."
        response = _answer(words, error.status_code, None, codes.get(error.status_code, "invalid_request"))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RuntimeError)
    def of_file(request: Request, error: RuntimeError) -> JSONResponse:
        if str(error).startswith(
            "File at path"
        ):  # Starlette's words for a file that vanished before it was sent
            return _answer("the file was removed.", 410, "id", "gone")
        raise error
