"""SLAB (Guo et al., ICML 2024), the peer of RePaViT's Table 3: norms that merge, and attention that is linear.

Training replaces LayerNorm step by step, ``λ LN(x) + (1 - λ) RepBN(x)`` with λ from 1 to 0 and
``RepBN(x) = BN(x) + η x``. At λ = 0 every norm is an affine map that folds into the linear layer behind it.
Attention has no softmax: ``relu(q) (relu(k + p)ᵀ v) / (relu(q) · Σ relu(k + p)) + DWConv(v)``, p a learnt position.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reparam
from ..models import complexity
from ..models.complexity import Complexity
from ..models.feed_forward import Form, check_form
from ..models.patch_embed import PatchEmbed
from .models import as_trained

KERNEL = 5  # of the convolution over values
EPS = 1e-6  # of attention's denominator


class RepBN(nn.Module):
    """``BN(x) + η x`` over the channels of tokens.

    Shapes:
        x  [B, T, C] → the same
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim)
        self.eta = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.transpose(1, 2)).transpose(1, 2) + self.eta * x


class ProgressiveNorm(nn.Module):
    """``λ LN(x) + (1 - λ) RepBN(x)``; :func:`set_progress` moves λ, a buffer, from 1 to 0.

    Shapes:
        x  [B, T, C] → the same
    """

    share: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim)
        self.rep_bn = RepBN(dim)
        self.register_buffer("share", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.share * self.layer_norm(x) + (1 - self.share) * self.rep_bn(x)

    def affine(self) -> reparam.Affine:
        """The map that is left at λ = 0.

        Raises:
            ValueError: λ is not 0.
        """
        if self.share != 0:
            raise ValueError(f"model: got λ = {self.share.item():g}, wanted 0: call set_progress(model, 1.0) first")
        bn = self.rep_bn.bn
        affine = reparam.batchnorm_affine(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
        return reparam.repbn_affine(affine, self.rep_bn.eta.detach())


def set_progress(model: nn.Module, done: float) -> None:
    """Set λ = 1 - done in every norm of a model.

    Args:
        done: share of the training steps that are over, in [0, 1].

    Raises:
        ValueError: done is outside [0, 1].
    """
    if not 0 <= done <= 1:
        raise ValueError(f"done: got {done}, wanted a share of the training in [0, 1]")
    for module in model.modules():
        if isinstance(module, ProgressiveNorm):
            module.share.fill_(1 - done)


class SimplifiedLinearAttention(nn.Module):
    """Attention without softmax, linear in the tokens; see the top of this file.

    Shapes:
        x  [B, T, C] → the same; T = grid², C divisible by num_heads
    """

    def __init__(self, dim: int, num_heads: int, grid: int) -> None:
        super().__init__()
        self.num_heads, self.grid = num_heads, grid
        head = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.position = nn.Parameter(torch.zeros(1, grid * grid, dim))
        self.conv = nn.Conv2d(head, head, KERNEL, padding=KERNEL // 2, groups=head)  # one for all heads
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        k = k + self.position
        q, k, v = (t.view(batch, tokens, self.num_heads, -1).transpose(1, 2) for t in (F.relu(q), F.relu(k), v))
        scale = 1 / (q @ k.sum(dim=2).unsqueeze(-1) + EPS)
        near = self.conv(v.transpose(2, 3).reshape(batch * self.num_heads, -1, self.grid, self.grid))
        out = q @ (k.transpose(2, 3) @ v) * scale + near.view(batch, self.num_heads, -1, tokens).transpose(2, 3)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


class SlabBlock(nn.Module):
    """``x + attn(norm1(x))``, then ``x + fc2(gelu(fc1(norm2(x))))``; ``norm`` builds both norms."""

    def __init__(self, dim: int, num_heads: int, grid: int, mlp_ratio: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = SimplifiedLinearAttention(dim, num_heads, grid)
        self.norm2 = norm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, mlp_ratio * dim), nn.Linear(mlp_ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class SlabVisionTransformer(nn.Module):
    """SLAB-DeiT: no class token, mean over the tokens. Deployed, it has no norms.

    Shapes:
        x  [B, 3, img_size, img_size] → [B, num_classes]
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        img_size: int = 224,
        patch_size: int = 16,
        mlp_ratio: int = 4,
        num_classes: int = 1000,
        form: Form = "training",
    ) -> None:
        super().__init__()
        check_form(form, vanilla=False)
        norm: Callable[[int], nn.Module] = ProgressiveNorm if form == "training" else nn.Identity
        grid = img_size // patch_size
        self.img_size = img_size
        self.patch_embed = PatchEmbed(patch_size, 3, embed_dim)
        self.pos_embed = nn.Parameter(torch.empty(1, grid * grid, embed_dim).normal_(0, 0.02))
        self.blocks = nn.Sequential(*(SlabBlock(embed_dim, num_heads, grid, mlp_ratio, norm) for _ in range(depth)))
        self.norm = norm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


def slab_deit_base(form: Form = "training") -> SlabVisionTransformer:
    """SLAB-DeiT-Base, freshly initialised."""
    return SlabVisionTransformer(768, 12, 12, form=form)


def seeded_slab() -> SlabVisionTransformer:
    """SLAB-DeiT-Base in evaluation mode as after training, at λ = 0."""
    torch.manual_seed(0)
    model = slab_deit_base()
    as_trained(model)
    set_progress(model, 1.0)
    return model


@torch.no_grad()
def merged(model: SlabVisionTransformer) -> SlabVisionTransformer:
    """A copy whose norms are folded into the layers behind them; the last one's mean over tokens commutes with it.

    Raises:
        ValueError: the model is not at λ = 0.
        RuntimeError: it is in training mode.
    """
    if model.training:
        raise RuntimeError("model: in training mode; call model.eval() first")
    model = copy.deepcopy(model)
    for block in _blocks(model):
        _fold(block.norm1, block.attn.qkv)
        _fold(block.norm2, block.fc1)
        block.norm1, block.norm2 = nn.Identity(), nn.Identity()
    _fold(model.norm, model.head)
    model.norm = nn.Identity()
    return model


def _blocks(model: SlabVisionTransformer) -> list[SlabBlock]:
    return [block for block in model.blocks if isinstance(block, SlabBlock)]


def _fold(norm: nn.Module, linear: nn.Linear) -> None:
    assert isinstance(norm, ProgressiveNorm)
    w, b = reparam.fold_affine_into_input(linear.weight, linear.bias, norm.affine())
    linear.weight.copy_(w)
    linear.bias.copy_(b)


def slab_complexity(model: SlabVisionTransformer) -> Complexity:
    """Parameters and MACs as the paper has them: with the products of linear attention."""
    counted = complexity(model, model.img_size)
    products = 0
    for attn in (block.attn for block in _blocks(model)):
        products += 2 * attn.grid**2 * attn.proj.in_features * attn.conv.in_channels
    return Complexity(counted.params, counted.macs + products)
