"""Routes of the gallery: ``/v1/gallery``. Imports no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from stdit.errors import UserError
from stdit.serve.errors import RequestError
from stdit.serve.gallery.gallery import Gallery
from stdit.serve.gallery.gallery_pages import GalleryPage
from stdit.serve.heavy_work import HeavyWork

_THUMBNAIL_SECONDS = 3600
"""Seconds for which a browser need not ask for a thumbnail again."""


@dataclass(frozen=True)
class DeletedGalleryVideo:
    """A video that was deleted."""

    id: str
    object: Literal["gallery.deleted"] = "gallery.deleted"
    deleted: bool = True


def gallery_routes(
    gallery: Gallery,
    inspect: Callable[[Path], Mapping[str, Any]],
    on_delete: Callable[[Path], None] = lambda file: None,
) -> APIRouter:
    """Return the routes of a gallery. They read files, so that each runs in a thread of its own.

    Args:
        inspect: returns what ``/v1/inspect`` says of a file.
        on_delete: called with the file of a video that was deleted.
    """
    routes, heavy = APIRouter(prefix="/v1/gallery", tags=["gallery"]), HeavyWork()

    @routes.get("")
    def list_gallery(
        limit: Annotated[int, Query(ge=1, le=200)] = 48,
        before: Annotated[str | None, Query(max_length=60)] = None,
        search: Annotated[str, Query(max_length=500)] = "",
        checkpoint: Annotated[str | None, Query(max_length=200)] = None,
    ) -> GalleryPage:
        """List the videos of the folder of outputs, newest first."""
        return gallery.page(limit, before, search, checkpoint)

    @routes.get("/{id}/content", response_class=FileResponse, responses={200: {"content": {"video/mp4": {}}}})
    def gallery_content(id: str, download: bool = False) -> FileResponse:
        """Return the mp4, or the range of it that the header Range names."""
        file = gallery.find(id)
        kind = "attachment" if download else "inline"
        return FileResponse(file, media_type="video/mp4", filename=file.name, content_disposition_type=kind)

    @routes.get(
        "/{id}/thumbnail", response_class=FileResponse, responses={200: {"content": {"image/webp": {}}}}
    )
    async def gallery_thumbnail(id: str) -> FileResponse:
        """Return some frames of a video as an animated WebP."""
        try:
            file = await heavy.run(partial(gallery.thumbnail, id))
        except RequestError:
            raise
        except UserError as error:
            raise RequestError(str(error), status=404, param="id", code="no_thumbnail") from None
        headers = {"Cache-Control": f"private, max-age={_THUMBNAIL_SECONDS}"}
        return FileResponse(file, media_type="image/webp", headers=headers)

    @routes.get("/{id}/settings")
    async def gallery_settings(id: str) -> dict[str, Any]:
        """Return the settings with which a video was made, and whether they make it again."""
        file = await run_in_threadpool(gallery.find, id)
        try:
            return dict(await heavy.run(partial(inspect, file)))
        except RequestError:
            raise
        except UserError as error:
            raise RequestError(str(error), status=404, param="id", code="no_metadata") from None

    @routes.delete("/{id}")
    def delete_gallery_video(id: str) -> DeletedGalleryVideo:
        """Delete a video, with its .json and .gif."""
        on_delete(gallery.delete(id))
        return DeletedGalleryVideo(id)

    return routes
