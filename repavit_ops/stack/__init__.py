"""Many blocks in one operator call: runs of blocks in a container, and whole models."""

from .fused_stack import FusedStack
from .one_call import OneCall

__all__ = ["FusedStack", "OneCall"]
