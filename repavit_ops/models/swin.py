"""Swin Transformers: windowed attention over a pyramid of channels-last maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import WindowAttention
from ..nn.branch import ResidualBranch
from ..stack import one_call
from ..stack_plan import Step
from .checkpointing import run_blocks
from .classifier import ImageClassifier, take_indices
from .feed_forward import Form, check_form, feed_forward
from .patch_embed import pair
from .schedule import block_act_channels, drop_path_rates


class SwinBlock(ResidualBranch):
    """``x = x + attn(norm1(x))``, then ``mlp(x)``, which holds its own norm and shortcut.

    Shapes:
        x, returns  [B, H, W, dim]

    Args:
        attn: window attention without norm or shortcut. mlp: a closed FFN.
        norm_eps: variance offset of norm1. drop_path: DropPath probability of the attention branch.
    """

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, *, norm_eps: float, drop_path: float = 0.0) -> None:
        super().__init__(dim, residual=True, skip_lam=1.0, layer_scale=None, drop_path=drop_path)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.close(x, self.attn(self.norm1(x))))


class SwinPatchEmbed(nn.Module):
    """Patches to a normed channels-last map: [B, in_chans, H, W] → [B, ⌈H/patch⌉, ⌈W/patch⌉, dim], zero-padded."""

    def __init__(self, patch_size: int, in_chans: int, dim: int, *, norm_eps: float) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted images [B, in_chans, H, W]")
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.patch_size, 0, -height % self.patch_size))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Halve a map: ``reduction(norm(2x2 neighbours))``, [B, H, W, C] → [B, ⌈H/2⌉, ⌈W/2⌉, 2C], odd sizes padded."""

    def __init__(self, dim: int, *, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=norm_eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        b, h, w, c = x.shape
        # neighbours in the order of the published weights: the column outer, the row inner
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).reshape(b, h // 2, w // 2, 4 * c)
        return self.reduction(self.norm(x))


class SwinStage(nn.Module):
    """Blocks at one resolution, then the merging that leads to the next (nothing after the last stage)."""

    grad_checkpointing = False

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = nn.Identity() if downsample is None else downsample

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.at_its_resolution(x))

    def at_its_resolution(self, x: Tensor) -> Tensor:
        """What comes out of the blocks, in front of the merging."""
        return run_blocks(self.blocks, x, self.grad_checkpointing)


class SwinTransformer(ImageClassifier):
    """Swin Transformer; vanilla, or with RePaViT's channel-idle FFN in every block.

    Patches → stages of blocks, every second one shifted by half a window → norm → mean over tokens → head. The state
    dict of the training form has the authors' keys. As in their code, maps smaller than or equal to the window are not
    shifted, and other maps are padded to whole windows first. (timm shifts both, and pads behind the shift: where every
    stage has whole windows, more than one, the two are equal.)

    Shapes:
        x        [B, in_chans, H, W]  any H, W: patches, windows and mergings pad
        returns  [B, num_classes]     [B, num_features] for num_classes = 0

    Args:
        img_size: pixels; settles only how far the window shrinks (to the stage's smaller side, where that is less).
        patch_size: pixels of a patch's side. in_chans: channels of the image. num_classes: 0 for no head.
        embed_dim: C of the first stage, doubled by each next. depths: blocks of each stage. num_heads: h of each stage.
        window_size: tokens of a window's side. mlp_ratio: ρ.
        idle_ratio: θ of all blocks or of each (over all stages); or
        act_channels: m, active channels, of each block. Both None: the vanilla twin.
        form: "training", or "deployed" for merged FFNs to load deployed weights into.
        qkv_bias: whether qkv has a bias. norm_eps: variance offset of every LayerNorm.
        head_bias: whether the head has a bias. drop_rate: dropout probability in front of the head.
        drop_path_rate: DropPath probability of the last block, linear from 0 at the first.
        dynamic_img_size: False to refuse images of another size than img_size.

    Raises:
        ValueError: an argument is out of range, depths and num_heads differ in length, both idle_ratio and act_channels
            are given, a per-block sequence has the wrong length, a vanilla model is asked for deployed.
    """

    global_pools = ("avg",)  # no class token
    feature_format = "NHWC"
    formats = ("NCHW", "NHWC")

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        idle_ratio: float | Sequence[float] | None = None,
        act_channels: int | Sequence[int] | None = None,
        form: Form = "training",
        qkv_bias: bool = True,
        norm_eps: float = 1e-5,
        head_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = True,
    ) -> None:
        if len(depths) != len(num_heads) or not depths:
            raise ValueError(f"depths, num_heads: got {depths} and {num_heads}, wanted one number each for every stage")
        dims = [embed_dim * 2**stage for stage in range(len(depths))]
        super().__init__(
            dims[-1],
            num_classes,
            global_pool="avg",
            head_bias=head_bias,
            drop_rate=drop_rate,
            dynamic_img_size=dynamic_img_size,
        )
        hidden = [int(dim * mlp_ratio) for dim, depth in zip(dims, depths, strict=True) for _ in range(depth)]
        active = block_act_channels(hidden, idle_ratio, act_channels)
        check_form(form, vanilla=active[0] is None if active else True)
        rates = drop_path_rates(drop_path_rate, len(hidden))
        self.embed_dim, self.patch_size, self.drop_path_rate = embed_dim, patch_size, drop_path_rate

        self.patch_embed = SwinPatchEmbed(patch_size, in_chans, embed_dim, norm_eps=norm_eps)
        self.layers = nn.Sequential()
        self.img_size = pair(img_size)
        size, first = [-(-side // patch_size) for side in self.img_size], 0
        for dim, depth, heads in zip(dims, depths, num_heads, strict=True):
            window = max(min(window_size, *size), 1)
            blocks = [
                swin_block(
                    dim,
                    heads,
                    window,
                    window // 2 if index % 2 else 0,
                    hidden[first + index],
                    active[first + index],
                    form,
                    qkv_bias=qkv_bias,
                    norm_eps=norm_eps,
                    drop_path=rates[first + index],
                )
                for index in range(depth)
            ]
            self.layers.append(SwinStage(blocks, PatchMerging(dim, norm_eps=norm_eps) if dim != dims[-1] else None))
            size, first = [-(-side // 2) for side in size], first + depth
        self.norm: nn.Module = nn.LayerNorm(dims[-1], eps=norm_eps)
        self.head = self.make_head()
        self.init_weights()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images → map [B, H', W', num_features] after the final norm."""
        self.check_size(x)
        return self.norm(self.layers(self.patch_embed(x)))

    def steps(self, x: Tensor) -> list[Step]:
        size = one_call.patch_grid(self.patch_embed, SwinPatchEmbed, x, self.patch_size)
        steps = [one_call.embedding(self.patch_embed.proj, x, norm=self.patch_embed.norm, as_map=True)]
        stage: SwinStage
        for stage in self.layers:  # type: ignore[assignment]
            steps += one_call.blocks(stage.blocks, size)
            if type(stage.downsample) is not nn.Identity:
                merging, size = one_call.merging(stage.downsample, size)
                steps.append(merging)
        return [*steps, one_call.head(self.norm, self.head, (*size, self.num_features), first=0, count=0)]

    def pool(self, x: Tensor) -> Tensor:
        return x.mean(dim=(1, 2))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features, and the maps of stages, each in front of its merging, for dense prediction; as timm gives them.

        Shapes:
            features       [B, H', W', num_features] after the final norm
            intermediates  in the order of the stages, each [B, C_s, h_s, w_s], or [B, h_s, w_s, C_s] for "NHWC"

        Args:
            x: images [B, in_chans, H, W].
            indices: which stages: None all, a number the last n, a sequence those (may be < 0).
            norm: apply the final norm to the last stage's map.
            stop_early: run no stage behind the last one asked for; features are then its map, without the norm.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list alone.

        Raises:
            ValueError: an index out of range; an unknown output_fmt.
        """
        self.check_format(output_fmt)
        self.check_size(x)
        wanted, last = take_indices(len(self.layers), indices), len(self.layers) - 1
        x = self.patch_embed(x)
        maps: list[Tensor] = []
        stages: Any = self.layers
        for index, stage in enumerate(stages):
            x = stage.at_its_resolution(x)
            if index in wanted:
                found = self.norm(x) if norm and index == last else x
                maps.append(found if output_fmt == "NHWC" else found.permute(0, 3, 1, 2).contiguous())
            if stop_early and index == max(wanted):
                break
            x = stage.downsample(x)
        if intermediates_only:
            return maps
        return (self.norm(x) if index == last else x), maps

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        return [
            {
                "module": f"layers.{index}",
                "num_chs": self.embed_dim * 2**index,
                "reduction": self.patch_size * 2**index,
                "index": index,
            }
            for index in range(len(self.layers))
        ]

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        wanted, count = take_indices(len(self.layers), indices), len(self.layers)
        kept: Any = self.layers[: max(wanted) + 1]
        cut = len(kept) < count
        if cut or prune_norm:
            self.norm = nn.Identity()  # it is as wide as the last stage
        if cut:
            kept[-1].downsample = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[max(wanted)]["num_chs"]
        self.layers = kept
        if cut or prune_head:
            self.reset_classifier(0)
        return wanted

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        stages: Any = self.layers
        for stage in stages:
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone (read by timm's optimizers)."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the stem and of the blocks (read by timm's layer-wise learning rates)."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)"}
        previous = (99999,)  # timm's mark for "with the group before"
        blocks = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", previous),
            (r"^norm\.", previous),
        ]
        return {"stem": r"^patch_embed", "blocks": blocks}


def swin_block(
    dim: int,
    num_heads: int,
    window: int,
    shift: int,
    hidden: int,
    act_channels: int | None,
    form: Form,
    *,
    qkv_bias: bool,
    norm_eps: float,
    drop_path: float,
) -> SwinBlock:
    """One block of a stage."""
    return SwinBlock(
        dim,
        WindowAttention(dim, num_heads, window, shift, qkv_bias=qkv_bias),
        feed_forward(dim, hidden, act_channels, form, norm_eps=norm_eps, drop_path=drop_path),
        norm_eps=norm_eps,
        drop_path=drop_path,
    )
