"""What varies from block to block: active channels and DropPath rates."""

from __future__ import annotations

from collections.abc import Sequence

from ..reparam import active_channels


def linear_idle_ratios(idle_ratio: float, depth: int) -> list[float]:
    """Idle ratio of each block under the authors' "linear" heuristic.

    Blocks k = 1 … L-1 get ``(2θ - 1) + (2 - 2θ) · k / (L - 1)``; the last keeps every activation (0). Their mean over
    the first L - 1 blocks is a little above θ, and θ < 1/2 needs a negative ratio, which is refused.

    Args:
        idle_ratio: θ in [0.5, 1]. depth: L, number of blocks.

    Raises:
        ValueError: θ would give a block a ratio outside [0, 1], or depth is below 1.
    """
    if depth < 1:
        raise ValueError(f"depth: got {depth}, wanted at least one block")
    low, span = 2 * idle_ratio - 1, 2 - 2 * idle_ratio
    # divided first, as the authors do: the ceil that gives m depends on the last bit
    ratios = [low + span / (depth - 1) * k for k in range(1, depth)]
    if any(not -1e-9 <= ratio <= 1 + 1e-9 for ratio in ratios):
        raise ValueError(
            f"idle_ratio: got {idle_ratio}, whose linear schedule over {depth} blocks runs from {ratios[0]:.3g} to "
            f"{ratios[-1]:.3g}, wanted ratios in [0, 1]; use a ratio of at least 0.5"
        )
    return [min(max(ratio, 0.0), 1.0) for ratio in ratios] + [0.0]


def block_act_channels(
    hidden: Sequence[int],
    idle_ratio: float | Sequence[float] | None,
    act_channels: int | Sequence[int] | None,
) -> list[int | None]:
    """Active channels m of every block; None for the vanilla FFN.

    Args:
        hidden: ρC of every block.
        idle_ratio: θ of all blocks or of each, m = ceil(ρC · (1 - θ)); or
        act_channels: m of all blocks or of each. Both None: vanilla blocks.

    Raises:
        ValueError: both are given, a sequence has the wrong length, or a value is out of range.
    """
    if idle_ratio is not None and act_channels is not None:
        raise ValueError(
            f"idle_ratio, act_channels: got {idle_ratio} and {act_channels}, wanted at most one of the two"
        )
    if idle_ratio is not None:
        ratios = per_block("idle_ratio", idle_ratio, len(hidden))
        return [active_channels(h, ratio) for h, ratio in zip(hidden, ratios, strict=True)]
    if act_channels is None:
        return [None] * len(hidden)
    counts = per_block("act_channels", act_channels, len(hidden))
    for block, (h, m) in enumerate(zip(hidden, counts, strict=True)):
        if not 0 <= m <= h:
            raise ValueError(f"act_channels: got {m} in block {block}, wanted 0 <= m <= hidden = {h}")
    return list(counts)


def per_block(name: str, value: float | Sequence[float], depth: int) -> list:
    """``value`` for each of ``depth`` blocks: repeated if it is a number, else checked for its length."""
    if not isinstance(value, Sequence):
        return [value] * depth
    if len(value) != depth:
        raise ValueError(f"{name}: got {len(value)} values, wanted one number or one for each of the {depth} blocks")
    return list(value)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """DropPath probability of each block: 0 at the first, ``rate`` at the last, linear between."""
    return [rate * k / max(depth - 1, 1) for k in range(depth)]
