"""Vision Transformers of few, wide-trained blocks: parallel branches that merge into one once joined."""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Block, JoinedBranchAttention, JoinedBranchFFN, set_join
from ..nn.join import JoinedBranches, Kappa, Norm
from ..nn.join_schedule import JoinCurve, Shape
from ..nn.joined_branch_attention import Join
from .feed_forward import Form
from .vit import VisionTransformer

# torch.compiler.disable imports Dynamo where it decorates, as long as all of PyTorch; the same as PyTorch's own modules
# have it imports Dynamo at the first call.
_uncompiled = getattr(torch, "_disable_dynamo", torch.compiler.disable)


def joined_block(
    dim: int,
    num_heads: int,
    hidden: int,
    act_channels: int | None,
    form: Form,
    *,
    join: Join,
    norm_eps: float,
    qkv_bias: bool,
    **branch: Any,
) -> nn.Module:
    """One block of B attention branches, then B FFN branches; arguments as ``vit_block``, and those of the branches."""
    if form != "training":
        raise ValueError(f"form: got {form!r}, wanted 'training' for joined branches; merge with reparameterize(model)")
    return Block(
        JoinedBranchAttention(dim, num_heads, join=join, norm_eps=norm_eps, qkv_bias=qkv_bias, **branch),
        JoinedBranchFFN(dim, hidden, act_channels=act_channels, norm_eps=norm_eps, **branch),
    )


class JoinedVisionTransformer(VisionTransformer):
    """ViT whose blocks hold B parallel branches, joined by :func:`repavit_ops.nn.set_join` as training goes on.

    Merged at α = 1, each block costs what one branch costs ("Rethinking Vision Transformer Depth via Structural
    Reparameterization", arXiv 2511.19718): a 12-block ViT becomes 12 / B blocks.

    A loop of your own steps a :class:`repavit_ops.nn.JoinSchedule`. For a loop that cannot be changed, such as timm's
    ``train.py``, ``join_steps`` lets the model do so: every forward in training mode sets its α and is counted in the
    buffer ``join_step``, so that a resumed training goes on where it stopped.

    Args:
        branches: B.
        join: "a" (queries, keys and values) or "b" (scores; merged heads are B times as wide) of every attention.
        kappa, norm, bypass: of every sub-block, as :class:`repavit_ops.nn.JoinedBranchFFN`.
        join_steps: forwards of the whole training, in one process: epochs · batches per epoch (with gradient
            accumulation, of the small batches). None: α moves only when it is set.
        join_shape, join_warmup, join_hold: of :class:`repavit_ops.nn.join_schedule.JoinCurve`.
        config: of :class:`VisionTransformer`; form is "training" and idle channels need no join.
    """

    join_step: Tensor | None

    def __init__(
        self,
        *,
        branches: int,
        join: Join = "a",
        kappa: Kappa = "mean",
        norm: Norm | None = "layernorm",
        bypass: bool = False,
        join_steps: int | None = None,
        join_shape: Shape = "linear",
        join_warmup: float = 0.1,
        join_hold: float = 0.4,
        **config: Any,
    ) -> None:
        options: dict[str, Any] = {"branches": branches, "join": join, "kappa": kappa, "norm": norm, "bypass": bypass}
        super().__init__(block=partial(joined_block, **options), **config)
        self.branches = branches
        self.join_curve = None if join_steps is None else JoinCurve(join_steps, join_shape, join_warmup, join_hold)
        self.register_buffer("join_step", None if join_steps is None else torch.zeros((), dtype=torch.int64))
        self._join_step = 0  # the same in Python: a forward waits for no device

    def begin_forward(self) -> None:
        if self.training and self.join_step is not None:
            self._advance(self.join_step)

    def no_weight_decay(self) -> set[str]:
        """As :class:`VisionTransformer`, and every branch's biases and affines: stacked [B, ...], they are not 1-D."""
        stacked = {
            f"{name}.{own}"
            for name, module in self.named_modules()
            if isinstance(module, JoinedBranches)
            for own, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 2
        }
        return super().no_weight_decay() | stacked

    @_uncompiled  # it changes what later calls compute
    def _advance(self, counter: Tensor) -> None:
        """Set α of this forward and count it. Once merged there is none to set."""
        if self.join_curve is not None and any(isinstance(module, JoinedBranches) for module in self.modules()):
            set_join(self, self.join_curve(self._join_step))
            self._join_step += 1
            counter.add_(1)

    def _load_from_state_dict(self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any) -> None:
        # whether a model counts its steps is no part of what it computes: checkpoints with and without fit both
        key = prefix + "join_step"
        if self.join_step is None:
            state_dict.pop(key, None)
        else:
            self._join_step = int(state_dict.setdefault(key, self.join_step))
        super()._load_from_state_dict(state_dict, prefix, *args)
