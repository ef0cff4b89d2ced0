"""Routes of the API for videos, as OpenAI's has them: models, submissions, progress, content."""

import json
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, UploadFile
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.datastructures import UploadFile as FormFile

from stdit.serve.api.estimates import Estimate, estimate
from stdit.serve.api.events import EventStream
from stdit.serve.api.inspection import Inspection, Inspector
from stdit.serve.api.schema import submission_schema
from stdit.serve.api.security import MAX_BODY, client_of, too_large_text
from stdit.serve.api.video_objects import Status, VideoObject, video_object
from stdit.serve.config import SampleCommand
from stdit.serve.errors import RequestError
from stdit.serve.gallery.thumbnails import thumbnail
from stdit.serve.heavy_work import HeavyWork
from stdit.serve.queue.catalog import Catalog
from stdit.serve.queue.job import COMPLETED, Job, NewJob
from stdit.serve.queue.jobs import JobStore, KeyReusedError, QueueFullError
from stdit.serve.queue.paths import ServerPaths
from stdit.serve.queue.submissions import FIELD_TYPES, Submission, hash_request, read_submission
from stdit.serve.queue.uploads import Uploads, no_room

_CHUNK = 2**20


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[VideoObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedObject(BaseModel):
    """A video that was deleted."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class UploadObject(BaseModel):
    """A file that was sent."""

    id: str
    object: Literal["upload"] = "upload"
    name: str
    bytes: int
    kind: Literal["image", "video"]
    num_frames: int
    fps: float
    width: int
    height: int


class NamedList(BaseModel):
    """A list of models or adapters."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


@dataclass
class VideoService:
    """What the routes of videos work with."""

    config: SampleCommand
    store: JobStore
    catalog: Catalog
    paths: ServerPaths
    events: EventStream

    def __post_init__(self) -> None:
        self.heavy = HeavyWork()
        total = int(self.config.server.max_uploads_gib * 2**30)
        self.uploads = replace(self.paths.uploads, max_total_bytes=total)
        self.inspector = Inspector(self.catalog, self.uploads, self.read)

    def read(self, fields: Mapping[str, Any]) -> Submission:
        """Check the fields of a request."""
        return read_submission(fields, self.catalog, partial(self.paths.find_frames, self.store))

    def submit(self, fields: Mapping[str, Any], client: str, key: str | None) -> Job:
        """Accept a request. Raises RequestError if it breaks a rule, or too many videos are waiting."""
        request_hash = hash_request(fields)
        known = None if key is None else self._known(client, key, request_hash)
        if known is not None:  # also if what it names is gone by now
            return known
        found = self.read(fields)
        new = NewJob(
            id=f"video_{secrets.token_hex(12)}",
            client=client,
            body=found.body,
            model=found.model.name,
            batch=found.batch,
            work=found.work,
            facts=found.facts(),
            request_hash=request_hash,
            key=key,
        )
        limits = self.config.server
        try:
            return self.store.submit(new, limits.max_waiting, limits.max_waiting_per_client)
        except KeyReusedError as error:
            raise _key_reused(error) from None
        except QueueFullError as error:
            raise RequestError(str(error), 429, None, "queue_full") from None

    def _known(self, client: str, key: str, request_hash: str) -> Job | None:
        try:
            return self.store.find_by_key(client, key, request_hash)
        except KeyReusedError as error:
            raise _key_reused(error) from None

    def job(self, job_id: str, field: str = "id") -> Job:
        """Return a job. Raises RequestError, of the field that names it, if there is none."""
        job = self.store.get(job_id)
        if job is None:
            raise RequestError(
                f"there is no video {job_id!r:.80}, or no longer: GET /v1/videos lists those that there are.",
                404,
                field,
                "not_found",
            )
        return job

    def shown(self, job: Job) -> VideoObject:
        """Return what the API says of a job."""
        return video_object(job, self.store, self.config.server.keep_days)

    def file(self, job: Job) -> Path:
        """Return the file of a finished video. Raises RequestError if there is none."""
        file = None if job.state != COMPLETED or job.file is None else self.paths.videos / job.file
        if file is None:
            raise RequestError(f"{job.id} is {job.state}: it has no content.", 409, "id", "not_ready")
        if not file.is_file():
            raise RequestError(f"the file of {job.id} was removed from the folder.", 410, "id", "gone")
        return file


def _key_reused(error: KeyReusedError) -> RequestError:
    return RequestError(str(error), 409, "Idempotency-Key", "idempotency_key_reused")


@asynccontextmanager
async def _form_of(request: Request, max_files: int, max_fields: int) -> AsyncIterator[FormData]:
    """Yield a form. Raises RequestError if the disk has no room for its files."""
    try:
        async with request.form(max_files=max_files, max_fields=max_fields) as form:
            yield form
    except OSError as error:
        raise no_room(error.strerror or "error") from None


async def submitted_fields(request: Request, uploads: Uploads, heavy: HeavyWork) -> dict[str, Any]:
    """Return the fields of a request, from JSON or a form; the files of a form are kept as uploads.

    Raises:
        RequestError: if it is neither.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        async with _form_of(request, max_files=8, max_fields=200) as form:
            return await _form_fields(form, uploads, heavy)
    try:
        fields = json.loads(await request.body() or b"{}")
    except (ValueError, RecursionError):
        raise RequestError(
            'the body is no JSON: send an object such as {"prompt": "a red ball"}.', 400
        ) from None
    if not isinstance(fields, dict):
        raise RequestError('the body must be an object such as {"prompt": "a red ball"}.', 400)
    return fields


async def _form_fields(form: FormData, uploads: Uploads, heavy: HeavyWork) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    conditions = []
    if sum(len(value) for _, value in form.multi_items() if isinstance(value, str)) > MAX_BODY:
        raise too_large_text()
    for name, value in form.multi_items():
        if isinstance(value, FormFile):
            if name not in ("input_reference", "image"):
                raise RequestError(
                    f"{name:.40}: send files as input_reference or to /v1/uploads.", param=name[:40]
                )
            kept = await heavy.run(partial(uploads.save, _chunks(value), value.filename or "", name))
            conditions.append({"upload": kept["id"], "frame": 0, "length": 1})
        elif name == "segment_prompts" and not value.startswith("["):
            fields.setdefault(name, []).append(value)
        elif name in fields:
            raise RequestError(f"{name:.40} is given twice: send it once.", param=name[:40])
        else:
            fields[name] = _form_value(name, value)
    if conditions:
        given = fields.get("conditions", [])
        fields["conditions"] = [*conditions, *(given if isinstance(given, list) else [given])]
    return fields


def _form_value(name: str, text: str) -> Any:
    """Return a field of a form in its type: all but texts are written as JSON."""
    types = FIELD_TYPES.get(name, (str,))
    if types == (str,):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        if list in types:
            raise RequestError(f"{name} = {text[:80]!r}: must be a list in JSON.", param=name) from None
        return text


def _chunks(file: FormFile | UploadFile) -> Any:
    while chunk := file.file.read(_CHUNK):
        yield chunk


def video_routes(service: VideoService) -> APIRouter:
    """Return the routes of models, uploads, videos and events."""
    router, store, paths, heavy = APIRouter(), service.store, service.paths, service.heavy

    async def small_picture(file: Path, pictures: bool = False) -> FileResponse:
        made = await heavy.run(partial(thumbnail, file, paths.thumbnails, pictures))
        return FileResponse(made, media_type="image/webp")

    @router.get("/v1/models")
    def list_models() -> NamedList:
        """List the models that can be sampled from."""
        return NamedList(data=service.catalog.list_models())

    @router.get("/v1/loras")
    def list_loras() -> NamedList:
        """List the adapters that can be used."""
        return NamedList(data=service.catalog.list_adapters())

    @router.post("/v1/videos", openapi_extra=submission_schema())
    async def create_video(
        request: Request,
        key: Annotated[str | None, Header(alias="Idempotency-Key", max_length=255, min_length=1)] = None,
    ) -> VideoObject:
        """Ask for a video."""
        fields = await submitted_fields(request, service.uploads, heavy)
        run = heavy.run if fields.get("conditions") else run_in_threadpool  # their files are probed
        return await run(lambda: service.shown(service.submit(fields, client_of(request.scope), key)))

    @router.post("/v1/estimate", openapi_extra=submission_schema())
    async def estimate_video(request: Request) -> Estimate:
        """Check a request, and estimate its time and memory; nothing is queued."""
        fields = await submitted_fields(request, service.uploads, heavy)
        return await heavy.run(lambda: estimate(service.read(fields), store, service.config))

    @router.get("/v1/videos")
    def list_videos(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
        status: Status | None = None,
    ) -> VideoList:
        """List videos in the order in which they were asked for."""
        number = None if after is None else service.job(after, "after").number
        jobs = store.list_jobs(limit + 1, number, order == "desc", status)
        shown = [service.shown(job) for job in jobs[:limit]]
        ends = (shown[0].id, shown[-1].id) if shown else (None, None)
        return VideoList(data=shown, has_more=len(jobs) > limit, first_id=ends[0], last_id=ends[1])

    @router.get("/v1/videos/{video_id}")
    def get_video(video_id: str) -> VideoObject:
        """Tell the state of a video."""
        return service.shown(service.job(video_id))

    @router.get("/v1/videos/{video_id}/content", response_class=Response)
    async def get_content(
        video_id: str,
        variant: Literal["video", "thumbnail", "preview", "settings"] = "video",
        download: bool = False,
    ) -> Response:
        """Send a finished video, its thumbnail or settings; or the newest preview of one that is being made."""
        job = await run_in_threadpool(service.job, video_id)
        if variant == "settings":
            return JSONResponse(job.body)
        if variant == "preview":
            image = await run_in_threadpool(store.preview, video_id)
            if image is None:
                raise RequestError(f"{video_id} has no preview now.", 404, "id", "not_found")
            return Response(image, media_type="image/webp", headers={"cache-control": "no-store"})
        file = await run_in_threadpool(service.file, job)
        if variant == "thumbnail":
            return await small_picture(file)
        return FileResponse(file, media_type="video/mp4", filename=file.name if download else None)

    @router.post("/v1/videos/{video_id}/cancel")
    def cancel_video(video_id: str) -> VideoObject:
        """Cancel a video that waits or is being made."""
        service.job(video_id)
        job = store.cancel(video_id)
        assert job is not None
        return service.shown(job)

    @router.delete("/v1/videos/{video_id}")
    def delete_video(video_id: str) -> DeletedObject:
        """Delete a video and its file; one that waits or is being made is cancelled."""
        service.job(video_id)
        try:
            paths.delete_video(store, video_id)
        except OSError as error:
            raise RequestError(
                f"the file of {video_id} cannot be deleted ({error.strerror}): check who may write to its folder.",
                status=409,
                code="not_deleted",
            ) from None
        return DeletedObject(id=video_id)

    @router.get("/v1/videos/{video_id}/events", response_class=StreamingResponse)
    async def watch_video(request: Request, video_id: str) -> StreamingResponse:
        """Stream the progress and previews of a video until it is over."""
        await run_in_threadpool(service.job, video_id)
        return _stream(service.events.listen([video_id], True, client_of(request.scope)))

    @router.get("/v1/events", response_class=StreamingResponse)
    async def watch_all(
        request: Request, ids: Annotated[str, Query(max_length=10_000)] = ""
    ) -> StreamingResponse:
        """Stream the progress and previews of all videos, or of some."""
        names = [name for name in ids.split(",") if name]
        return _stream(service.events.listen(names, address=client_of(request.scope)))

    @router.post("/v1/uploads", openapi_extra=_FILE_SCHEMA)
    async def upload(request: Request) -> UploadObject:
        """Send a picture or video whose frames are to be used as conditioning frames."""
        async with _form_of(request, max_files=1, max_fields=8) as form:
            file = _one_file(form)
            kept = await heavy.run(partial(service.uploads.save, _chunks(file), file.filename or ""))
        return UploadObject(**kept)

    @router.get("/v1/uploads/{upload_id}/thumbnail", response_class=FileResponse)
    async def get_upload(upload_id: str) -> FileResponse:
        """Send a small picture of an upload, which moves if it is a video."""
        file = await run_in_threadpool(service.uploads.find, upload_id)
        return await small_picture(file, pictures=True)

    @router.post("/v1/inspect", openapi_extra=_FILE_SCHEMA)
    async def inspect(request: Request) -> Inspection:
        """Read how a video of stdit was made from its file, and whether it can be made again here."""
        async with _form_of(request, max_files=1, max_fields=8) as form:
            file = _one_file(form)
            return await heavy.run(partial(service.inspector.sent_file, file.file, file.filename or ""))

    return router


_FILE_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "string", "format": "binary"}},
                    "required": ["file"],
                }
            }
        },
    }
}


def _one_file(form: FormData) -> FormFile:
    file = form.get("file")
    if not isinstance(file, FormFile):
        raise RequestError("no file: send one in the field file of a form.", 400, "file")
    return file


def _stream(events: AsyncIterator[str]) -> StreamingResponse:
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)
