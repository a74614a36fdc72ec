"""Video files: frames by time, and questions about videos of any length."""

from vtc.video.files import DECODERS, VideoFile, VideoInfo, sample_by_count, sample_by_fps, sample_by_scenes

__all__ = ["DECODERS", "VideoFile", "VideoInfo", "sample_by_count", "sample_by_fps", "sample_by_scenes"]
