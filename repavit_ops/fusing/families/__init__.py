"""The families whose blocks fuse: one file each, registered here. No library is imported that the user has not."""

from ..rules import register
from .open_clip import OPEN_CLIP
from .ours import OURS
from .timm import TIMM
from .torch import TORCH
from .torchvision import TORCHVISION
from .transformers import TRANSFORMERS

for family in (OURS, TORCH, TIMM, TRANSFORMERS, TORCHVISION, OPEN_CLIP):
    register(family)
