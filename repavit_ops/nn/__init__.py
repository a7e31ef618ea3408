"""Modules: training forms (what is learnt) and deployed forms (what the operators compute)."""

from .attention import Attention, WindowAttention
from .block import Block
from .channel_idle_ffn import ChannelIdleFFN
from .conv_relu import ConvReLU2d
from .deployed_shape_ffn import DeployedShapeFFN
from .ffn import FFN
from .gated_ffn import GatedFFN
from .join import set_join
from .join_schedule import JoinSchedule
from .joined_branch_attention import JoinedBranchAttention
from .joined_branch_ffn import JoinedBranchFFN
from .norm import RepBN, TokenBatchNorm
from .partial_gelu_ffn import PartialGELUFFN
from .patch_conv import PatchConv2d
from .patch_projection import PatchProjection
from .quick_gelu import QuickGELU
from .recalibrate import recalibrate_bn
from .rep_attention import RepAttention
from .window_rep_attention import WindowRepAttention

__all__ = [
    "FFN",
    "Attention",
    "Block",
    "ChannelIdleFFN",
    "ConvReLU2d",
    "DeployedShapeFFN",
    "GatedFFN",
    "JoinSchedule",
    "JoinedBranchAttention",
    "JoinedBranchFFN",
    "PartialGELUFFN",
    "PatchConv2d",
    "PatchProjection",
    "QuickGELU",
    "RepAttention",
    "RepBN",
    "TokenBatchNorm",
    "WindowAttention",
    "WindowRepAttention",
    "recalibrate_bn",
    "set_join",
]
