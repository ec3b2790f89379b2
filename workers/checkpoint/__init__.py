"""A model's files, read by name and byte range: a folder or the Hub; headers, config, old formats."""

from workers.checkpoint.base import Checkpoint, CheckpointFile

__all__ = ["Checkpoint", "CheckpointFile"]
