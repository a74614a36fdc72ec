"""Video files: frames by time, and questions about videos of any length."""

from vtc.video.files import DECODERS, VideoFile, VideoInfo
from vtc.video.sampling import (
    check_sampling,
    sample_by_count,
    sample_by_default,
    sample_by_fps,
    sample_by_scenes,
)

__all__ = [
    "DECODERS",
    "VideoFile",
    "VideoInfo",
    "check_sampling",
    "sample_by_count",
    "sample_by_default",
    "sample_by_fps",
    "sample_by_scenes",
]
