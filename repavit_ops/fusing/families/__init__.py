"""The families whose blocks fuse: one file each, registered here. No library is imported that the user has not."""

from ..rules import register
from .ours import OURS
from .timm import TIMM

for family in (OURS, TIMM):
    register(family)
