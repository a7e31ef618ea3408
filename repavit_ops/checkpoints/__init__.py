"""Checkpoint files: read without running code, in our layout and in the authors'; models rebuilt from them."""

from .description import build, describe
from .load_and_save import load_checkpoint, save_checkpoint

__all__ = ["build", "describe", "load_checkpoint", "save_checkpoint"]
