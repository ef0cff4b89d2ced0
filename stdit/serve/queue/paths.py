"""Where a server keeps what: its state, the videos that it makes, and the folders that it shows."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from stdit.atomic_files import write_json_atomic
from stdit.pipelines.requests import Request
from stdit.pipelines.writer import slug
from stdit.serve.errors import RequestError
from stdit.serve.queue.job import COMPLETED
from stdit.serve.queue.jobs import JobStore
from stdit.serve.queue.uploads import Uploads

_FILE = "paths.json"
_VIDEO_ID = re.compile(r"video_[0-9a-f]{24}")


@dataclass(frozen=True)
class ServerPaths:
    """The folders of a server, which its workers share."""

    state: Path
    """Jobs, uploads, thumbnails."""
    videos: Path
    """The videos that the server makes."""
    runs: Path
    loras: Path | None = None
    max_upload_bytes: int = 2**26

    @property
    def jobs_file(self) -> Path:
        """SQLite file of the jobs."""
        return self.state / "jobs.sqlite"

    @property
    def uploads(self) -> Uploads:
        """The files that clients sent."""
        return Uploads(self.state / "uploads", self.max_upload_bytes)

    @property
    def thumbnails(self) -> Path:
        """Folder of the thumbnails of videos and uploads, which may be deleted."""
        return self.state / "thumbnails"

    def delete_video(self, store: JobStore, job_id: str) -> None:
        """Forget a job, and delete its video. Raises OSError if that cannot be deleted."""
        file = store.delete(job_id)
        if file is not None:
            (self.videos / file).unlink(missing_ok=True)

    def write(self) -> None:
        """Write this for the workers."""
        self.state.mkdir(parents=True, exist_ok=True)
        values = {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()
        }
        write_json_atomic(self.state / _FILE, values)

    @classmethod
    def read(cls, state: Path) -> "ServerPaths":
        """Return what a server has written into its folder of state."""
        values = json.loads((state / _FILE).read_text(encoding="utf-8"))
        paths = {name: Path(values[name]) for name in ("state", "videos", "runs")}
        loras = None if values["loras"] is None else Path(values["loras"])
        return cls(**paths, loras=loras, max_upload_bytes=values["max_upload_bytes"])

    def video_file(self, job_id: str, request: Request) -> Path:
        """Return the file of a job's video: the same one whenever the job is done."""
        return self.videos / f"{slug(request.prompt)}-seed{request.seed}-{job_id.removeprefix('video_')}.mp4"

    def find_frames(self, store: JobStore, kind: str, name: str) -> Path:
        """Return the file of an upload, or of a video that is finished. Raises RequestError if there is none."""
        if kind == "upload":
            return self.uploads.find(name)
        job = store.get(name) if _VIDEO_ID.fullmatch(name) else None
        file = None if job is None or job.state != COMPLETED or job.file is None else self.videos / job.file
        if file is None or not file.is_file():
            raise RequestError(
                f"there is no finished video {name!r:.80}: wait until it is, or choose another.",
                status=404,
                param="id",
                code="not_found",
            )
        return file
