"""Vision Transformers built from :mod:`repavit_ops.nn`: the models of the papers and their vanilla twins."""

from .complexity import Complexity, complexity
from .dinov2 import load_dinov2_small
from .features import FeatureExtractor
from .joined import JoinedVisionTransformer
from .lvvit import LVViT
from .registry import create_model, list_models
from .schedule import linear_idle_ratios
from .swin import SwinTransformer
from .timm_registry import install as install_timm_registry
from .vit import VisionTransformer

__all__ = [
    "Complexity",
    "FeatureExtractor",
    "JoinedVisionTransformer",
    "LVViT",
    "SwinTransformer",
    "VisionTransformer",
    "complexity",
    "create_model",
    "linear_idle_ratios",
    "list_models",
    "load_dinov2_small",
]

install_timm_registry()
