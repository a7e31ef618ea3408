"""Single operators at the sizes of DeiT and Swin: the module in plain PyTorch, ours on kernels, and every peer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn import PartialGELUFFN, RepAttention, WindowRepAttention
from .measuring import OURS, OWN_SLACK, Call, Case, Provider
from .peers import Subject, find_peers

TOKENS = 197  # of an image of 224 pixels, and the class token
HEAD, WINDOW, WINDOW_HEAD = 64, 7, 32  # channels of a head of DeiT; tokens of a side and channels of a head of Swin
EPS = 1e-6
CHECKED = 2


class Operator(NamedTuple):
    """One operator at one size.

    build: the module for a backend. tokens: shape of one image's input. products: multiply-accumulates of one image.
    """

    name: str
    build: Callable[[str], nn.Module]
    tokens: tuple[int, ...]
    products: int


def _ffn(c: int, m: int) -> Operator:
    return Operator(
        f"ffn C{c} m{m}",
        lambda backend: PartialGELUFFN(c, m, backend=backend),  # type: ignore[arg-type]
        (TOKENS, c),
        TOKENS * c * (2 * m + c),
    )


def _attention(c: int) -> Operator:
    return Operator(
        f"attention C{c}",
        lambda backend: RepAttention(c, c // HEAD, norm_eps=EPS, residual=True, backend=backend),  # type: ignore[arg-type]
        (TOKENS, c),
        TOKENS * c * (4 * c + 2 * TOKENS),
    )


def _windows(c: int, size: int) -> Operator:
    shift = WINDOW // 2 if size > WINDOW else 0

    def build(backend: str) -> nn.Module:
        more = {"norm_eps": EPS, "residual": True, "backend": backend}
        return WindowRepAttention(c, c // WINDOW_HEAD, WINDOW, shift, **more)  # type: ignore[arg-type]

    return Operator(f"windows {size}x{size} C{c}", build, (size, size, c), size * size * c * (4 * c + 2 * WINDOW**2))


OPERATORS = {
    operator.name: operator
    for operator in (
        *(_ffn(c, c) for c in (192, 384, 768, 1024, 1280)),
        _ffn(384, 768),
        *(_attention(c) for c in (192, 384, 768)),
        *(_windows(c, size) for c, size in ((96, 56), (192, 28), (384, 14), (768, 7))),
    )
}
QUICK = ("ffn C192 m192", "ffn C384 m384", "attention C192", "attention C384", "windows 14x14 C384")


def operator_case(
    name: str, batch: int, dtype: torch.dtype, peers: Sequence[str] | None = None, quick: bool = False
) -> Case:
    """One of :data:`OPERATORS`, beside eager PyTorch and the peers that are here.

    Raises:
        ValueError: an unknown peer.
    """
    operator = OPERATORS[name]
    usable, missing = find_peers(peers, dtype, quick)
    plain = _seeded(operator.build("reference"))
    x = torch.randn(batch, *operator.tokens, generator=torch.Generator().manual_seed(1)).to(dtype)
    subject = Subject(plain, x)

    def ours() -> Call:
        fused = operator.build("auto").eval()
        fused.load_state_dict(plain.state_dict())
        return functools.partial(fused.to(dtype), x)

    def truth() -> Tensor:
        wide = operator.build("reference").eval()
        wide.load_state_dict(plain.state_dict())
        return wide.double()(x[:CHECKED].double())

    providers = {
        "eager": Provider(lambda: functools.partial(subject.cast, x)),
        OURS: Provider(ours, own=True, slack=OWN_SLACK),
    }
    providers |= {peer.name: Provider(functools.partial(peer.call, subject)) for peer in usable}
    moved = x.element_size() * (sum(p.numel() for p in plain.parameters()) + 2 * x.numel())
    return Case(
        f"{name} batch {batch}",
        dtype,
        batch,
        providers,
        {"": truth},
        flop=2 * operator.products * batch,
        bytes=moved,
        left_out=missing,
    )


@torch.no_grad()
def _seeded(module: nn.Module) -> nn.Module:
    """Weights ~ 1/√fan_in, biases of 0.1."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.normal_(0, p.shape[-1] ** -0.5 if p.dim() == 2 else 0.1, generator=generator)
    return module.eval()
