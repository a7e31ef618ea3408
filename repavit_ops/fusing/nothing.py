"""What to tell of a model of which nothing fuses: the classes that were looked at, and the nearest ones that fuse."""

from __future__ import annotations

from collections import Counter
from difflib import get_close_matches

from torch import nn

from .rules import known_classes

SHOWN = 8
PARTS = (nn.Linear, nn.MultiheadAttention, nn.LayerNorm)


def nothing_fuses(model: nn.Module) -> str:
    """One paragraph: classes with projections or norms in them, their number, and what of them is closest to fusing."""
    holding = Counter(
        f"{type(module).__module__}.{type(module).__qualname__}"
        for module in model.modules()
        if any(isinstance(child, PARTS) for child in module.children())
    )
    if not holding:
        return "nothing fuses: the model holds no Linear, attention or LayerNorm"
    looked = ", ".join(f"{name} ({count})" for name, count in holding.most_common(SHOWN))
    more = f" and {len(holding) - SHOWN} more" if len(holding) > SHOWN else ""
    names = {name.rpartition(".")[2]: name for name in known_classes()}
    near = {
        names[match]
        for name in list(holding)[: 4 * SHOWN]
        for match in get_close_matches(name.rpartition(".")[2], names, n=1, cutoff=0.5)
    }
    nearest = f"; the nearest that fuse: {', '.join(sorted(near)[:SHOWN])}" if near else ""
    return f"nothing fuses; looked at {looked}{more}{nearest}; docs/coverage.md lists what does"
