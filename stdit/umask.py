"""Give files that libraries make readable by their owner only the mode of any new file."""

import os
import tempfile
from pathlib import Path


def apply_umask(path: Path) -> None:
    """Give a file, or the safetensors in a folder, the mode of any new file: they are made readable by the owner
    only."""
    mode = 0o666 & ~_umask()
    for file in [path] if path.is_file() else path.rglob("*.safetensors"):
        file.chmod(mode)


def _umask() -> int:
    """Return the umask of the process without changing it: ``os.umask`` would, for all threads and for a moment."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(next(line for line in status.splitlines() if line.startswith("Umask:")).split()[1], 8)
    except (OSError, StopIteration):  # not Linux
        with tempfile.TemporaryDirectory() as folder:
            descriptor = os.open(Path(folder) / "probe", os.O_CREAT | os.O_WRONLY, 0o666)
            try:
                return 0o666 & ~os.fstat(descriptor).st_mode
            finally:
                os.close(descriptor)
