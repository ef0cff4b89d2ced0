"""Video data: manifests, decoding, buckets, batches, cache, preparation, and the embedded shapes data set.

See README.md for how to use them. `build_plan(DataConfig(...))` reads the manifest and plans all batches, and
`video_loader(plan)` decodes them.
"""

from typing import TYPE_CHECKING

from stdit.data.config import BucketConfig, DataConfig, SourceConfig
from stdit.lazy import lazy_getattr

if TYPE_CHECKING:
    from stdit.data.buckets import Bucket
    from stdit.data.build import build_plan
    from stdit.data.dataset import video_loader
    from stdit.data.decoding.decode import DecodeError, decode_clip, probe
    from stdit.data.manifest.clips import Clip, Clips
    from stdit.data.manifest.reading import read_manifest
    from stdit.data.plan import BatchPlan

__all__ = [
    "BatchPlan",
    "Bucket",
    "BucketConfig",
    "Clip",
    "Clips",
    "DataConfig",
    "DecodeError",
    "SourceConfig",
    "build_plan",
    "decode_clip",
    "probe",
    "read_manifest",
    "video_loader",
]

__getattr__ = lazy_getattr(
    __name__,
    {
        "BatchPlan": "stdit.data.plan",
        "Bucket": "stdit.data.buckets",
        "Clip": "stdit.data.manifest.clips",
        "Clips": "stdit.data.manifest.clips",
        "DecodeError": "stdit.data.decoding.decode",
        "build_plan": "stdit.data.build",
        "decode_clip": "stdit.data.decoding.decode",
        "probe": "stdit.data.decoding.decode",
        "read_manifest": "stdit.data.manifest.reading",
        "video_loader": "stdit.data.dataset",
    },
)
