"""Vanilla FFN of a transformer block."""

from __future__ import annotations

from torch import Tensor, nn

from .branch import ResidualBranch


class FFN(ResidualBranch):
    """Vanilla FFN with its norm and shortcut: ``x + fc2(gelu(fc1(LN(x))))`` (RePaViT, eq. 1).

    Shapes:
        x, returns  [..., dim]
        fc1.weight  [hidden, dim];  fc2.weight [dim, hidden]

    Args:
        dim: C. hidden: ρC.
        norm_eps: variance offset of the LayerNorm.
        approximate: "none" (erf GELU) or "tanh".
        drop: dropout probability after the activation and after fc2.
        residual, skip_lam, layer_scale, drop_path: as :class:`ResidualBranch`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        norm_eps: float = 1e-5,
        approximate: str = "none",
        drop: float = 0.0,
        residual: bool = True,
        skip_lam: float = 1.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(dim, residual=residual, skip_lam=skip_lam, layer_scale=layer_scale, drop_path=drop_path)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate=approximate)
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.act(self.fc1(self.norm(x))))
        return self.close(x, self.drop(self.fc2(h)))
