"""Which FFN a block gets: vanilla, channel-idle (training) or merged (deployed)."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn

from ..nn import FFN, ChannelIdleFFN, PartialGELUFFN

Form = Literal["training", "deployed"]


def feed_forward(
    dim: int,
    hidden: int,
    act_channels: int | None,
    form: Form,
    *,
    norm_eps: float,
    skip_lam: float = 1.0,
    layer_scale: float | None = None,
    drop_path: float = 0.0,
) -> nn.Module:
    """The closed FFN half of a block (norm, shortcut and scales inside).

    Args:
        dim: C. hidden: ρC.
        act_channels: m; None for the vanilla FFN.
        form: "training" builds :class:`ChannelIdleFFN`; "deployed" the empty plain-PyTorch
            :class:`PartialGELUFFN` that a deployed checkpoint is loaded into, whose weights hold norms, scales and
            shortcut (where no channel is idle, m = hidden, the shortcut stays an addition).
        norm_eps: of the vanilla FFN's LayerNorm.
        skip_lam, layer_scale, drop_path: as :class:`FFN`.
    """
    branch: dict[str, Any] = {"skip_lam": skip_lam, "layer_scale": layer_scale, "drop_path": drop_path}
    if act_channels is None:
        return FFN(dim, hidden, norm_eps=norm_eps, **branch)
    if form == "training":
        return ChannelIdleFFN(dim, hidden, act_channels=act_channels, **branch)
    idle = act_channels < hidden
    return PartialGELUFFN(dim, act_channels, merged=idle, residual=not idle, backend="reference")


def check_form(form: str, vanilla: bool) -> None:
    """Raise ValueError for an unknown form, or for the deployed form of a vanilla model (it has none)."""
    if form not in get_args(Form):
        raise ValueError(f"form: got {form!r}, wanted one of {', '.join(get_args(Form))}")
    if form == "deployed" and vanilla:
        raise ValueError("form: got 'deployed' for a vanilla model; give idle_ratio or act_channels")
