"""Plain Vision Transformers: ViT, DeiT, and what CLIP and DINO use of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Attention, Block
from ..stack import one_call
from ..stack_plan import Step
from .checkpointing import run_block, run_blocks
from .classifier import ImageClassifier, take_indices, to_map, trunc_normal_parameter
from .feed_forward import Form, check_form, feed_forward
from .patch_embed import PatchEmbed, pair
from .position import resample_position
from .schedule import block_act_channels, drop_path_rates


def vit_block(
    dim: int,
    num_heads: int,
    hidden: int,
    act_channels: int | None,
    form: Form,
    *,
    qkv_bias: bool,
    norm_eps: float,
    **branch: Any,
) -> nn.Module:
    """One block; ``branch`` is skip_lam, layer_scale and drop_path of both its halves."""
    return Block(
        Attention(dim, num_heads, qkv_bias=qkv_bias, norm=partial(nn.LayerNorm, eps=norm_eps), **branch),
        feed_forward(dim, hidden, act_channels, form, norm_eps=norm_eps, **branch),
    )


class VisionTransformer(ImageClassifier):
    """Vision Transformer with a class token; vanilla, or with RePaViT's channel-idle FFN in every block.

    Patches → class token → + position → [norm_pre] → blocks → norm → class token (or mean) → head. The state dict of
    the training form has the authors' keys.

    Shapes:
        x        [B, in_chans, H, W]   H, W divisible by patch_size; other grids than img_size's resample pos_embed
        returns  [B, num_classes]      [B, embed_dim] for num_classes = 0

    Args:
        img_size: pixels, one number or (height, width): the grid of pos_embed.
        patch_size: pixels of a patch's side. in_chans: channels of the image. num_classes: 0 for no head.
        embed_dim: C. depth: L, blocks. num_heads: h. mlp_ratio: ρ.
        idle_ratio: θ of all blocks or of each; or
        act_channels: m, active channels, of all blocks or of each. Both None: the vanilla twin.
        form: "training", or "deployed" for merged FFNs to load deployed weights into.
        qkv_bias: whether qkv has a bias.
        pre_norm: LayerNorm in front of the blocks; the patch projection then has no bias (as timm's pre_norm).
        global_pool: "token" (class token) or "avg" (mean of the patch tokens).
        norm_eps: variance offset of norm_pre and norm. block_norm_eps: that of the norms inside the blocks.
        head_bias: whether the head has a bias. drop_rate: dropout probability in front of the head.
        drop_path_rate: DropPath probability of the last block, linear from 0 at the first.
        skip_lam, layer_scale: of every residual branch, as :class:`repavit_ops.nn.Attention`.
        dynamic_img_size: False to refuse images of another size than img_size.
        embed_layer: builds the patch embedding from (patch_size, in_chans, embed_dim, bias=).
        block: builds a block from the arguments of :func:`vit_block`.

    Raises:
        ValueError: an argument is out of range, both idle_ratio and act_channels are given, a per-block sequence has
            the wrong length, a vanilla model is asked for deployed; at a call, the image size is not divisible.
    """

    feature_indices = 3
    formats = ("NCHW", "NLC")
    grad_checkpointing = False

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        idle_ratio: float | Sequence[float] | None = None,
        act_channels: int | Sequence[int] | None = None,
        form: Form = "training",
        qkv_bias: bool = True,
        pre_norm: bool = True,
        global_pool: str = "token",
        norm_eps: float = 1e-6,
        block_norm_eps: float = 1e-5,
        head_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        skip_lam: float = 1.0,
        layer_scale: float | None = None,
        dynamic_img_size: bool = True,
        embed_layer: Callable[..., nn.Module] = PatchEmbed,
        block: Callable[..., nn.Module] = vit_block,
    ) -> None:
        super().__init__(
            embed_dim,
            num_classes,
            global_pool=global_pool,
            head_bias=head_bias,
            drop_rate=drop_rate,
            dynamic_img_size=dynamic_img_size,
        )
        hidden = int(embed_dim * mlp_ratio)
        active = block_act_channels([hidden] * depth, idle_ratio, act_channels)
        check_form(form, vanilla=active[0] is None if active else True)
        self.embed_dim, self.patch_size, self.drop_path_rate = embed_dim, patch_size, drop_path_rate
        self.grid_size = self._grid(pair(img_size))

        self.patch_embed = embed_layer(patch_size, in_chans, embed_dim, bias=not pre_norm)
        self.cls_token = trunc_normal_parameter(1, 1, embed_dim)
        self.pos_embed = trunc_normal_parameter(1, 1 + self.grid_size[0] * self.grid_size[1], embed_dim)
        self.norm_pre = nn.LayerNorm(embed_dim, eps=norm_eps) if pre_norm else nn.Identity()
        branch = {"skip_lam": skip_lam, "layer_scale": layer_scale}
        self.blocks = nn.Sequential(
            *(
                block(
                    embed_dim,
                    num_heads,
                    hidden,
                    m,
                    form,
                    qkv_bias=qkv_bias,
                    norm_eps=block_norm_eps,
                    drop_path=rate,
                    **branch,
                )
                for m, rate in zip(active, drop_path_rates(drop_path_rate, depth), strict=True)
            )
        )
        self.norm: nn.Module = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.head = self.make_head()
        self.init_weights()

    def begin_forward(self) -> None:
        """What a subclass does ahead of every forward, whether of features, logits or intermediates; here nothing."""

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images → tokens [B, 1 + h·w, C] in front of the blocks, and their grid (h, w)."""
        self.check_size(x)
        self.begin_forward()
        x = self.patch_embed(x)
        grid = (x.shape[2], x.shape[3])
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)), dim=1)
        return self.norm_pre(x + resample_position(self.pos_embed, self.grid_size, grid)), grid

    def forward_features(self, x: Tensor) -> Tensor:
        """Images → tokens [B, 1 + h·w, C] after the final norm, the class token first."""
        return self.norm(run_blocks(self.blocks, self.embed(x)[0], self.grad_checkpointing))

    def steps(self, x: Tensor) -> list[Step]:
        grid = one_call.patch_grid(self.patch_embed, PatchEmbed, x, self.patch_size)
        position = resample_position(self.pos_embed, self.grid_size, grid)
        embedding = one_call.embedding(
            self.patch_embed.get_submodule("proj"), x, prefix=self.cls_token, position=position, norm=self.norm_pre
        )
        first, count = (0, 1) if self.global_pool == "token" else (1, 0)
        head = one_call.head(self.norm, self.head, position.shape[1:], first=first, count=count)
        return [embedding, *one_call.blocks(self.blocks, (position.shape[1],)), head]

    def pool(self, x: Tensor) -> Tensor:
        return x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(dim=1)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Features after the final norm, and the patch tokens behind blocks, for dense prediction; as timm gives them.

        Shapes:
            features       [B, 1 + h·w, C]
            intermediates  in the order of the blocks, each [B, C, h, w], or [B, h·w, C] for ``output_fmt`` "NLC"

        Args:
            x: images [B, in_chans, H, W].
            indices: which blocks: None all, a number the last n, a sequence those (may be < 0).
            return_prefix_tokens: each intermediate becomes a pair: itself and the class token [B, 1, C].
            norm: apply the final norm to each.
            stop_early: run no block behind the last one asked for; features are then those of that block.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: return the list alone.
            output_dict: return {"image_features", "image_intermediates", "image_intermediates_prefix"}, of which the
                last only with return_prefix_tokens, the first not with intermediates_only.

        Returns:
            (features, intermediates), or as the last two arguments say.

        Raises:
            ValueError: an index out of range; an unknown output_fmt; the image size is not divisible by the patch.
        """
        self.check_format(output_fmt)
        wanted = take_indices(len(self.blocks), indices)
        x, grid = self.embed(x)
        tokens: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if stop_early and index > max(wanted):
                break
            x = run_block(block, x, self.grad_checkpointing)
            if index in wanted:
                tokens.append(self.norm(x) if norm else x)
        patches = [t[:, 1:] for t in tokens]
        maps = patches if output_fmt == "NLC" else [to_map(t, grid) for t in patches]
        prefixes = [t[:, :1] for t in tokens]
        if output_dict:
            answer: dict[str, Any] = {"image_intermediates": maps}
            answer |= {"image_intermediates_prefix": prefixes} if return_prefix_tokens else {}
            return answer if intermediates_only else answer | {"image_features": self.norm(x)}
        found: list[Any] = list(zip(maps, prefixes, strict=True)) if return_prefix_tokens else maps
        return found if intermediates_only else (self.norm(x), found)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        return [
            {"module": f"blocks.{index}", "num_chs": self.embed_dim, "reduction": self.patch_size, "index": index}
            for index in range(len(self.blocks))
        ]

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        wanted = take_indices(len(self.blocks), indices)
        kept: Any = self.blocks[: max(wanted) + 1]
        self.blocks = kept
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return wanted

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.no_grad()
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resample pos_embed once to another image size, so that images of that size no longer resample it per call."""
        grid = self._grid(pair(img_size))
        self.pos_embed = nn.Parameter(resample_position(self.pos_embed, self.grid_size, grid).clone())
        self.grid_size = grid

    def _grid(self, img_size: tuple[int, int]) -> tuple[int, int]:
        height, width = img_size
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise ValueError(
                f"img_size: got {height}x{width}, wanted positive multiples of the patch size {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone (read by timm's optimizers)."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the stem and of the blocks (read by timm's layer-wise learning rates)."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))],
        }
