"""Many blocks in one operator call: runs of blocks in a container, and whole models."""

from .fused_stack import FusedStack
from .looped_blocks import LoopedBlocks, LoopOwner
from .one_call import OneCall

__all__ = ["FusedStack", "LoopOwner", "LoopedBlocks", "OneCall"]
