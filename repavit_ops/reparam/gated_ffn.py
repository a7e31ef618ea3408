"""The fold of a gated FFN (SwiGLU, GEGLU), and which of its channels may skip the gate.

With the norms folded, hidden channel i of a gated FFN is ``act(g_i x) · (u_i x)``. A channel that skips its gate, i.e.
whose act(g_i x) is replaced by 1, is ``u_i x``: linear in x, like an idle channel of RePaViT. All such collapse:

    (act(x W_gateᵀ + b_gate) ∘ (x W_upᵀ + b_up)) W_outᵀ + x W_mergedᵀ + bias,    W_merged = W_out[:, m:] W_up[m:]

What it saves per token: an idle channel costs 2 C multiplications (up, out) against 3 C of a gated one, and the merged
ones cost C² together. So merging pays from C / 2 idle channels on, and against the gated FFN from C / 3 on. A norm
between gate and W_out sees all hidden channels at once; with one, nothing is linear and nothing merges.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .affine import Affine, affine_as_float64, fold_affine_into_input, fold_output_scale
from .ffn import _checked_act_channels
from .precision import as_float64, bias_as_float64


class MergedGatedFFN(NamedTuple):
    """``y = h W_outᵀ [+ x W_mergedᵀ] + bias [+ x if residual]``, the operands of `gated_ffn`, with
    ``h = act(x W_gateᵀ + b_gate) ∘ (x W_upᵀ + b_up)``.

    Shapes:
        w_gate, w_up [m, C], b_gate, b_up [m], w_out [C, m]; m = 0 is tensors of size 0
        w_merged [C, C], or None where every channel is gated
        bias [C]
        residual: the shortcut still has to be added
    """

    w_gate: Tensor
    b_gate: Tensor
    w_up: Tensor
    b_up: Tensor
    w_out: Tensor
    w_merged: Tensor | None
    bias: Tensor
    residual: bool = False


def merge_gated_ffn(
    w_gate: Tensor,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    input_affine: Affine | None = None,
    inner_affine: Affine | None = None,
    output_scale: Tensor | float | None = None,
    shortcut: bool = True,
) -> MergedGatedFFN:
    """Merge ``s * out(inner_norm(gated(up(z)))) [+ x]`` with z = input_norm(x), exactly.

    The first m hidden channels, as many as w_gate has rows, are multiplied by their gates; the others are idle.

    Shapes:
        w_gate [m, C], b_gate [m] or None; w_up [hidden, C], b_up [hidden] or None; w_out [C, hidden], b_out [C] or None
        returns MergedGatedFFN in float64

    Args:
        input_affine: affine of the norm in front, [C]; its core and the shortcut stay with the caller.
        inner_affine: affine of the norm between gate and w_out, [hidden] (EVA02); its core stays with the caller.
        output_scale: LayerScale [C] or a number. Scales the bias too, never the shortcut.
        shortcut: the FFN adds its input.

    Raises:
        ValueError: a shape disagrees, there are more gates than hidden channels, or an inner norm meets idle channels;
            names the argument.
    """
    w_gate = as_float64(w_gate, "w_gate", m=None, C=None)
    m, dim = w_gate.shape
    b_gate = bias_as_float64(b_gate, "b_gate", w_gate)
    w_up = as_float64(w_up, "w_up", hidden=None, C=dim)
    hidden = w_up.shape[0]
    b_up = bias_as_float64(b_up, "b_up", w_up)
    w_out = as_float64(w_out, "w_out", C=dim, hidden=hidden)
    b_out = bias_as_float64(b_out, "b_out", w_out)
    _checked_act_channels(m, hidden)
    if inner_affine is not None and m != hidden:
        raise ValueError(
            f"inner_affine: got a norm over {hidden} channels of which {hidden - m} are idle; behind it nothing is "
            "linear, so none can be merged: give every channel its gate"
        )
    if input_affine is not None:
        affine = affine_as_float64(input_affine, "input_affine", dim)
        w_gate, b_gate = fold_affine_into_input(w_gate, b_gate, affine)
        w_up, b_up = fold_affine_into_input(w_up, b_up, affine)
    if inner_affine is not None:
        w_out, b_out = fold_affine_into_input(w_out, b_out, affine_as_float64(inner_affine, "inner_affine", hidden))
    if output_scale is not None:
        w_out, b_out = fold_output_scale(w_out, b_out, output_scale)
    w_merged = None if m == hidden else w_out[:, m:] @ w_up[m:]
    bias = w_out[:, m:] @ b_up[m:] + b_out
    return MergedGatedFFN(w_gate, b_gate, w_up[:m], b_up[:m], w_out[:, :m], w_merged, bias, residual=shortcut)
