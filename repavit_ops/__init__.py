"""repavit_ops: train, merge, fuse and verify reparameterized Vision Transformers."""

from .version import __version__

__all__ = ["__version__"]
