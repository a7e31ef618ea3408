"""From a pretrained ViT to a reparameterized one: block by block, then by a short distillation.

An extra that the core never imports: ``repavit_ops.idle_pretrained``, ``distill_blocks`` and ``distill`` load it.
"""

from .block_distillation import distill_blocks
from .distillation import distill
from .fidelity import Fidelity, Speed, fidelity, speed
from .pretrained import BlockResult, idle_pretrained

__all__ = ["BlockResult", "Fidelity", "Speed", "distill", "distill_blocks", "fidelity", "idle_pretrained", "speed"]
