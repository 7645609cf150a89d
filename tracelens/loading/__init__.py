"""A checkpoint on disk -> a hooked model, exactly."""

from tracelens.loading.checkpoint import Checkpoint, open_checkpoint
from tracelens.loading.load import load

__all__ = ["Checkpoint", "load", "open_checkpoint"]
