"""Vision Transformers built from :mod:`repavit_ops.nn`: the models of the RePaViT paper and their vanilla twins."""

from .swin import SwinTransformer
from .vit import VisionTransformer

__all__ = ["SwinTransformer", "VisionTransformer"]
