"""SLAB-DeiT-Base and SLAB-Swin-Base, as the authors' published configurations have them, built from their parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..models import complexity
from ..models.complexity import Complexity
from ..models.feed_forward import Form, check_form
from ..models.patch_embed import PatchEmbed
from ..nn import recalibrate_bn
from .models import as_trained, images_for
from .slab import (
    Norm,
    Normed,
    ProgressiveNorm,
    RepBN,
    SimplifiedLinearAttention,
    SlabBlock,
    TokenWindowAttention,
    folded,
    folded_back,
    set_progress,
)

WINDOW = 7  # tokens of a side, in the stages that keep Swin's attention
ETA = 0.3  # of seeded models


class SlabModel(Normed):
    """A classifier by the mean over its tokens: ``head(mean(norm(tokens)))``. Deployed, it has no norms.

    Shapes:
        x  [B, 3, img_size, img_size] → [B, num_classes]

    Args:
        img_size: pixels.
        norm: builds the last norm. dim: its channels.
        num_classes: of the head.
    """

    def __init__(self, img_size: int, norm: Norm, dim: int, num_classes: int) -> None:
        super().__init__()
        self.img_size = img_size
        self.norm = norm(dim)
        self.head = nn.Linear(dim, num_classes)

    def tokens(self, x: Tensor) -> Tensor:
        """Images to tokens [B, T, C] in front of the last norm."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.tokens(x)).mean(dim=1))

    def fold_norms(self) -> None:
        self.norm = folded(self.norm, self.head)


def norm_of(form: Form) -> Norm:
    """What builds a form's norms: none are left in the deployed one."""
    check_form(form, vanilla=False)
    return ProgressiveNorm if form == "training" else nn.Identity


class SlabVisionTransformer(SlabModel):
    """SLAB-DeiT: no class token, linear attention over all tokens in every block."""

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
        norm = norm_of(form)
        super().__init__(img_size, norm, embed_dim, num_classes)
        grid = img_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, 3, embed_dim)
        self.pos_embed = nn.Parameter(torch.empty(1, grid * grid, embed_dim).normal_(0, 0.02))
        self.blocks = nn.Sequential(
            *(
                SlabBlock(embed_dim, SimplifiedLinearAttention(embed_dim, num_heads, grid), mlp_ratio, norm)
                for _ in range(depth)
            )
        )

    def tokens(self, x: Tensor) -> Tensor:
        return self.blocks(self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed)


class SlabStem(Normed):
    """Patches to normed tokens: [B, 3, H, W] → [B, T, dim]."""

    def __init__(self, patch_size: int, dim: int, norm: Norm) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch_size, 3, dim)
        self.norm = norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.patch_embed(x).flatten(2).transpose(1, 2))

    def fold_norms(self) -> None:
        self.norm = folded_back(self.norm, self.patch_embed.proj)


class SlabMerging(Normed):
    """``reduction(norm(2x2 neighbours))``: [B, grid², dim] → [B, grid²/4, 2 dim]; biased once its norm is in it."""

    def __init__(self, dim: int, grid: int, norm: Norm) -> None:
        super().__init__()
        self.grid = grid
        self.norm = norm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=isinstance(self.norm, nn.Identity))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, dim = x.shape
        # neighbours in Swin's order: the column outer, the row inner
        x = x.view(batch, self.grid // 2, 2, self.grid // 2, 2, dim).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.reshape(batch, -1, 4 * dim)))

    def fold_norms(self) -> None:
        self.norm = folded(self.norm, self.reduction)


class SlabSwinTransformer(SlabModel):
    """SLAB-Swin: the early stages' attention is linear and over the whole map, the others keep Swin's windows.

    Args:
        embed_dim: C of the first stage, doubled by each next. depths: blocks of each stage. num_heads: of each stage.
        linear: "L" or "S" for each stage: linear attention, or softmax in windows.
        window: tokens of a window's side; every second block is shifted by half of it where a map has several.
        img_size, patch_size, mlp_ratio, num_classes, form: as of :class:`SlabVisionTransformer`.

    Raises:
        ValueError: the windows of a stage do not cover its map.
    """

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        linear: str = "LLSS",
        window: int = WINDOW,
        img_size: int = 224,
        patch_size: int = 4,
        mlp_ratio: int = 4,
        num_classes: int = 1000,
        form: Form = "training",
    ) -> None:
        norm, last = norm_of(form), len(depths) - 1
        super().__init__(img_size, norm, embed_dim * 2**last, num_classes)
        self.stem = SlabStem(patch_size, embed_dim, norm)
        self.layers = nn.Sequential()
        for stage, (depth, heads, kind) in enumerate(zip(depths, num_heads, linear, strict=True)):
            dim, grid = embed_dim * 2**stage, img_size // patch_size // 2**stage
            if kind == "S" and grid % window:
                raise ValueError(f"window: got {window} for maps of {grid} x {grid} tokens, wanted a divisor of {grid}")
            for index in range(depth):
                shift = window // 2 if index % 2 and grid > window else 0
                attn = (
                    SimplifiedLinearAttention(dim, heads, grid)
                    if kind == "L"
                    else TokenWindowAttention(dim, heads, grid, window, shift)
                )
                self.layers.append(SlabBlock(dim, attn, mlp_ratio, norm))
            if stage < last:
                self.layers.append(SlabMerging(dim, grid, norm))

    def tokens(self, x: Tensor) -> Tensor:
        return self.layers(self.stem(x))


def slab_deit_base(form: Form = "training") -> SlabModel:
    """SLAB-DeiT-Base, freshly initialised."""
    return SlabVisionTransformer(768, 12, 12, form=form)


def slab_swin_base(form: Form = "training") -> SlabModel:
    """SLAB-Swin-Base, freshly initialised."""
    return SlabSwinTransformer(128, (2, 2, 18, 2), (4, 8, 16, 32), form=form)


MODELS: dict[str, Callable[[Form], SlabModel]] = {"slab_deit_base": slab_deit_base, "slab_swin_base": slab_swin_base}


def seeded_slab(name: str) -> SlabModel:
    """A model of MODELS in evaluation mode as after training, at λ = 0.

    Its BatchNorms have the statistics of images, and its η are small: with others nothing holds the tokens' size, the
    windows' softmax picks one token, which one float32 cannot say, and a comparison with float64 means nothing.
    """
    torch.manual_seed(0)
    model = MODELS[name]("training")
    as_trained(model)
    set_progress(model, 1.0)
    for module in model.modules():
        if isinstance(module, RepBN):
            nn.init.constant_(module.eta, ETA)
    recalibrate_bn(model, [images_for(model, 2, torch.float32)])
    return model


def slab_complexity(model: SlabModel) -> Complexity:
    """Parameters and MACs as the paper has them: with attention's products, of windows and linear ones."""
    counted = complexity(model, model.img_size, attention_products=True)
    products = 0
    for attn in model.modules():
        if isinstance(attn, SimplifiedLinearAttention):
            products += 2 * attn.grid**2 * attn.proj.in_features * attn.conv.in_channels
    return Complexity(counted.params, counted.macs + products)


def position_parameters(model: SlabModel) -> int:
    """How many of the parameters are positions that linear attention adds to its keys."""
    return sum(attn.position.numel() for attn in model.modules() if isinstance(attn, SimplifiedLinearAttention))
