"""A model's structure as JSON values, and back: what a native checkpoint needs besides its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import backends
from ..models.joined import JoinedVisionTransformer
from ..models.lvvit import ConvStem, FusedConvStem, LVViT
from ..models.patch_embed import PatchEmbed
from ..models.swin import PatchMerging, SwinBlock, SwinPatchEmbed, SwinStage, SwinTransformer
from ..models.vit import VisionTransformer
from ..nn import (
    FFN,
    Attention,
    Block,
    ChannelIdleFFN,
    DeployedShapeFFN,
    GatedFFN,
    JoinedBranchAttention,
    JoinedBranchFFN,
    PartialGELUFFN,
    PatchConv2d,
    PatchProjection,
    RepAttention,
    RepBN,
    TokenBatchNorm,
    WindowAttention,
    WindowRepAttention,
)
from ..nn.attention import relative_position_index
from ..nn.join import JoinedBranches
from ..nn.joined_branch_attention import BypassedAttention

Arguments = dict[str, Any]
BRANCH = ("residual", "skip_lam", "drop_path")  # attributes that are arguments of every ResidualBranch
FUSED_ATTENTION = ("dim", "num_heads", "d_qk", "d_v", "scale", "norm_eps", "residual", "norm", "backend")
BEHIND = ("qk_norm_eps", "qk_norm", "rotary_layout", "inner_norm_eps")  # what stands behind its products


class Kind(NamedTuple):
    """How one class is described.

    Args:
        arguments: constructor arguments, read from a module.
        children: submodules described in turn and set after construction; None for all of them.
        optional: parameters that may be None whatever the constructor was told.
        build: makes the module from its arguments; the class itself by default.
    """

    arguments: Callable[[Any], Arguments]
    children: tuple[str, ...] | None = ()
    optional: tuple[str, ...] = ()
    build: Callable[..., nn.Module] | None = None


def describe(module: nn.Module) -> Arguments:
    """JSON values from which :func:`build` makes the same module, weights apart.

    Raises:
        ValueError: the module holds one that is not of this package; names both.
    """
    return _describe(module, "")


def build(description: Arguments) -> nn.Module:
    """The described module on the meta device: structure and shapes, no weights yet.

    Raises:
        ValueError: no description, or one of an unknown class.
    """
    try:
        with torch.device("meta"):
            return _build(description)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"config: got no description of a model that this version can build ({error})") from error


def fill_derived_buffers(module: nn.Module) -> None:
    """Recompute on its weights' device what a module built on the meta device derives from its arguments."""
    for child in module.modules():
        if isinstance(child, WindowAttention):
            device = child.relative_position_bias_table.device
            child.relative_position_index = relative_position_index(child.window[0]).to(device)


def _describe(module: nn.Module, path: str) -> Arguments:
    kind = KINDS.get(type(module))
    name = type(module).__name__
    if kind is None and isinstance(module, nn.Sequential):  # a fused run of blocks is one to its keys
        kind, name = KINDS[nn.Sequential], nn.Sequential.__name__
    if kind is None:
        raise ValueError(
            f"model: got a {type(module).__module__}.{name} at {path or 'its root'}, wanted modules of repavit_ops; "
            "save its state_dict() with torch.save instead"
        )
    description: Arguments = {"type": name}
    if arguments := kind.arguments(module):
        description["args"] = arguments
    if absent := [parameter for parameter in kind.optional if getattr(module, parameter) is None]:
        description["absent"] = absent
    names: Iterable[str] = dict(module.named_children()) if kind.children is None else kind.children
    if children := {child: _describe(getattr(module, child), f"{path}.{child}".lstrip(".")) for child in names}:
        description["children"] = children
    return description


def _build(description: Arguments) -> nn.Module:
    cls = CLASSES[description["type"]]
    module = (KINDS[cls].build or cls)(**description.get("args", {}))
    for parameter in description.get("absent", ()):
        setattr(module, parameter, None)
    for child, inner in description.get("children", {}).items():
        setattr(module, child, _build(inner))
    return module


def _attributes(*names: str, **renamed: Callable[[Any], Any]) -> Callable[[Any], Arguments]:
    """Arguments equal to attributes of the same name, and others by a function of the module."""

    def arguments(module: Any) -> Arguments:
        return {name: _plain(getattr(module, name)) for name in names} | {
            name: _plain(value(module)) for name, value in renamed.items()
        }

    return arguments


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _scales(module: Any) -> float | None:
    """LayerScale's presence as its constructor argument; the values are in the state dict."""
    return None if module.ls is None else 1.0


def _has_bias(name: str) -> Callable[[Any], bool]:
    return lambda module: getattr(module, name).bias is not None


def _normless(cls: type[nn.Module]) -> Callable[..., nn.Module]:
    """Build without a norm: it is a described child."""
    return lambda **arguments: cls(norm=None, **arguments)


def _kappa(module: JoinedBranches) -> str:
    return "mean" if module.kappa == 1 / module.branches else "sum"


def _core(module: JoinedBranches) -> str | None:
    """The ``norm`` argument of joined branches."""
    if isinstance(module.norm, nn.LayerNorm):
        return "layernorm"
    return "batchnorm" if isinstance(module.norm, TokenBatchNorm) else None


def _joined(*names: str, **renamed: Callable[[Any], Any]) -> Callable[[Any], Arguments]:
    """Arguments of joined branches."""
    return _attributes(
        *("dim", "branches", *BRANCH, *names),
        kappa=_kappa,
        norm=_core,
        norm_eps=lambda module: getattr(module.norm, "eps", 1e-6),
        bypass=lambda module: module.bypass is not None,
        layer_scale=_scales,
        **renamed,
    )


def _bypassed(dim: int, residual: bool) -> BypassedAttention:
    return BypassedAttention(Attention(dim, 1), torch.empty(dim, dim), None, residual)


def _image(module: VisionTransformer) -> list[int]:
    return [side * module.patch_size for side in module.grid_size]


def _join_curve(module: JoinedVisionTransformer) -> Arguments:
    """Arguments of a model that raises α by itself."""
    curve = module.join_curve
    return {} if curve is None else {f"join_{name}": value for name, value in asdict(curve).items()}


def _bare(cls: type[VisionTransformer]) -> Callable[..., nn.Module]:
    """Build without blocks: they are described children."""
    return lambda **arguments: cls(depth=0, **arguments)


def _projection(module: Any) -> str | None:
    """The backend of a patch embedding's convolution where that is a fused one."""
    return module.proj.backend if isinstance(module.proj, PatchConv2d) else None


def _embedding(cls: type[nn.Module]) -> Callable[..., nn.Module]:
    """Build with a fused convolution where the description says so."""

    def build(projection: backends.Backend | None = None, **arguments: Any) -> nn.Module:
        module: Any = cls(**arguments)
        if projection is not None:
            module.proj = PatchConv2d.replacing(module.proj, projection)
        return module

    return build


def _swin(img_size: list[int] | None, stages: int, **arguments: Any) -> SwinTransformer:
    model: Any = SwinTransformer(depths=(0,) * stages, num_heads=(1,) * stages, **arguments)
    model.img_size = img_size
    return model


VIT_CHILDREN = ("patch_embed", "norm_pre", "blocks", "norm", "head")
_plain_vit = _attributes(
    *("patch_size", "embed_dim", "num_classes", "head_bias", "global_pool", "drop_path_rate"),
    img_size=_image,
    drop_rate=lambda module: module.head_drop.p,
)

KINDS: dict[type[nn.Module], Kind] = {
    nn.Identity: Kind(_attributes()),
    nn.Sequential: Kind(_attributes(), children=None),
    nn.Linear: Kind(_attributes("in_features", "out_features", bias=lambda module: module.bias is not None)),
    nn.LayerNorm: Kind(
        _attributes("normalized_shape", "eps", "elementwise_affine", bias=lambda module: module.bias is not None)
    ),
    TokenBatchNorm: Kind(_attributes("num_features", "eps", "affine")),
    RepBN: Kind(_attributes("num_features", "eps")),
    PatchEmbed: Kind(
        _attributes(
            "patch_size",
            in_chans=lambda module: module.proj.in_channels,
            dim=lambda module: module.proj.out_channels,
            bias=_has_bias("proj"),
            projection=_projection,
        ),
        build=_embedding(PatchEmbed),
    ),
    ConvStem: Kind(
        _attributes(
            "patch_size",
            in_chans=lambda module: module.conv1.in_channels,
            dim=lambda module: module.proj.out_channels,
            bias=_has_bias("proj"),
        )
    ),
    FusedConvStem: Kind(
        _attributes(
            "patch_size",
            in_chans=lambda module: module.conv1.in_channels,
            dim=lambda module: module.proj.dim_out,
            bias=_has_bias("proj"),
            backend=lambda module: module.proj.backend,
        )
    ),
    SwinPatchEmbed: Kind(
        _attributes(
            "patch_size",
            in_chans=lambda module: module.proj.in_channels,
            dim=lambda module: module.proj.out_channels,
            norm_eps=lambda module: module.norm.eps,
            projection=_projection,
        ),
        build=_embedding(SwinPatchEmbed),
    ),
    PatchMerging: Kind(
        _attributes(dim=lambda module: module.reduction.in_features // 4, norm_eps=lambda module: module.norm.eps)
    ),
    Attention: Kind(
        _attributes(
            "dim", "num_heads", "d_qk", "d_v", "scale", *BRANCH, qkv_bias=_has_bias("qkv"), layer_scale=_scales
        ),
        children=("norm",),
        build=_normless(Attention),
    ),
    WindowAttention: Kind(
        _attributes(
            "dim",
            "num_heads",
            window=lambda module: module.window[0],
            shift=lambda module: module.shift[0],
            qkv_bias=_has_bias("qkv"),
        )
    ),
    FFN: Kind(
        _attributes(
            *BRANCH,
            dim=lambda module: module.fc1.in_features,
            hidden=lambda module: module.fc1.out_features,
            norm_eps=lambda module: module.norm.eps,
            approximate=lambda module: module.act.approximate,
            drop=lambda module: module.drop.p,
            layer_scale=_scales,
        )
    ),
    ChannelIdleFFN: Kind(
        _attributes(
            "dim",
            "hidden",
            "act_channels",
            "approximate",
            *BRANCH,
            bn_eps=lambda module: module.norm1.eps,
            drop=lambda module: module.drop.p,
            layer_scale=_scales,
        )
    ),
    DeployedShapeFFN: Kind(
        _attributes(
            "dim",
            "act_channels",
            "approximate",
            *BRANCH,
            batchnorm=lambda module: module.norm is not None,
            bn_eps=lambda module: 1e-5 if module.norm is None else module.norm.eps,
            layer_scale=_scales,
        )
    ),
    JoinedBranchFFN: Kind(_joined("hidden", "act_channels", "approximate", drop=lambda module: module.drop.p)),
    JoinedBranchAttention: Kind(
        _joined(
            "num_heads",
            join=lambda module: "b" if module.joins_scores else "a",
            qkv_bias=lambda module: module.qkv_bias is not None,
        )
    ),
    BypassedAttention: Kind(
        _attributes("residual", dim=lambda module: module.w_merged.shape[0]),
        children=("norm", "attn"),
        build=_bypassed,
    ),
    PartialGELUFFN: Kind(
        _attributes("dim", "act_channels", "norm_eps", "residual", "norm", "approximate", "backend"),
        optional=("b_in", "w_merged", "bias"),
    ),
    GatedFFN: Kind(
        _attributes(
            *("dim", "act_channels", "activation", "norm_eps", "inner_norm_eps", "residual", "norm", "backend")
        ),
        optional=("b_gate", "b_up", "w_merged", "bias"),
    ),
    RepAttention: Kind(
        _attributes(
            *FUSED_ATTENTION,
            *BEHIND,
            dim_out=lambda module: module.w_proj.shape[0],
        ),
        optional=("b_qkv", "b_proj"),
    ),
    WindowRepAttention: Kind(
        _attributes(
            *FUSED_ATTENTION,
            *("window", "shift", "roll_first", "static_shift", "shift_by_axis"),
            dim_out=lambda module: module.w_proj.shape[0],
            padding=lambda module: module.pad_kv is not None,
        ),
        optional=("b_qkv", "b_proj"),
    ),
    PatchProjection: Kind(
        _attributes("in_chans", "dim_out", "patch", "channels_last", "norm_eps", "pad", "backend"), optional=("bias",)
    ),
    Block: Kind(_attributes(), children=("attn", "mlp"), build=lambda: Block(nn.Identity(), nn.Identity())),
    SwinBlock: Kind(
        _attributes("drop_path", dim=lambda module: module.norm1.normalized_shape[0], norm_eps=lambda m: m.norm1.eps),
        children=("norm1", "attn", "mlp"),
        build=lambda **arguments: SwinBlock(attn=nn.Identity(), mlp=nn.Identity(), **arguments),
    ),
    SwinStage: Kind(_attributes(), children=("blocks", "downsample"), build=lambda: SwinStage((), None)),
    VisionTransformer: Kind(_plain_vit, VIT_CHILDREN, build=_bare(VisionTransformer)),
    LVViT: Kind(_plain_vit, (*VIT_CHILDREN, "aux_head"), build=_bare(LVViT)),
    JoinedVisionTransformer: Kind(
        lambda module: _plain_vit(module) | {"branches": module.branches} | _join_curve(module),
        VIT_CHILDREN,
        build=_bare(JoinedVisionTransformer),
    ),
    SwinTransformer: Kind(
        _attributes(
            *("patch_size", "embed_dim", "num_classes", "head_bias", "drop_path_rate"),
            img_size=lambda module: getattr(module, "img_size", None),
            stages=lambda module: len(module.layers),
            drop_rate=lambda module: module.head_drop.p,
        ),
        children=("patch_embed", "layers", "norm", "head"),
        build=_swin,
    ),
}
CLASSES = {cls.__name__: cls for cls in KINDS}
