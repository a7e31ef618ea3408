"""The authors' state dicts: telling family and form apart, and translating keys to ours and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..models.swin import SwinTransformer
from ..models.vit import VisionTransformer
from ..nn import ChannelIdleFFN, PartialGELUFFN, PatchProjection, RepAttention, WindowAttention
from ..nn.attention import relative_position_index
from ..reference import shift_mask
from ..reparam import fold_identity, is_identity

Family = Literal["vit", "swin"]
StateForm = Literal["training", "deployed", "merged", "fused"]

BLOCK: dict[Family, re.Pattern[str]] = {
    "vit": re.compile(r"blocks\.(\d+)\."),
    "swin": re.compile(r"layers\.(\d+)\.blocks\.(\d+)\."),
}
CLASSES: dict[Family, type[nn.Module]] = {"vit": VisionTransformer, "swin": SwinTransformer}

# The authors' deployed FFN reuses the names of the training form: fc1 is now the merged matrix, fc2 the way in.
DEPLOYED_NAMES = {
    "fc1.weight": "w_merged",
    "fc1.bias": "bias",
    "fc2.weight": "w_in",
    "fc2.bias": "b_in",
    "fc3.weight": "w_out",
}
DERIVED = re.compile(r"\.attn\.relative_position_index$|\.attn_mask$")


def family_of(state: Mapping[str, Tensor]) -> Family:
    """Which family the keys belong to.

    Raises:
        ValueError: neither; names some keys.
    """
    for family, pattern in BLOCK.items():
        if any(pattern.match(key) for key in state):
            return family
    shown = ", ".join(list(state)[:6]) or "none"
    raise ValueError(
        f"source: got keys of no known model ({shown}), wanted a RePaViT state dict (blocks.0.…, layers.0.blocks.0.…) "
        "or a file written by save_checkpoint"
    )


def form_of(state: Mapping[str, Tensor], family: Family) -> StateForm:
    """Which form the FFNs (and attentions) of a state dict are in.

    "training": two BatchNorms per FFN; "deployed": the authors' merged keys; "merged": ours; "fused": fused attention.

    Raises:
        ValueError: an FFN of no known form, or forms that differ between blocks; names the blocks.
    """
    forms: dict[StateForm | None, list[str]] = {}
    for block in block_names(state, family):
        forms.setdefault(_block_form(state, block), []).append(block.rstrip("."))
    if unknown := forms.pop(None, None):
        raise ValueError(
            f"source: got an FFN of no known form in {_some(unknown)}, wanted mlp.norm1 and mlp.norm2 (training), "
            "a square mlp.fc1 without norms (deployed) or mlp.w_in (ours); a vanilla model has no channel-idle FFN"
        )
    if len(forms) > 1:
        parts = "; ".join(f"{form}: {_some(blocks)}" for form, blocks in forms.items())
        raise ValueError(
            f"source: got blocks of different forms ({parts}), wanted one form; save partly merged models with "
            'save_checkpoint(model, path, layout="native") and load that file'
        )
    (form,) = forms
    assert form is not None
    return form


def _block_form(state: Mapping[str, Tensor], block: str) -> StateForm | None:
    names = {key.removeprefix(block) for key in state if key.startswith(block)}
    if "attn.w_qkv" in names:
        return "fused"
    if "mlp.w_in" in names or "mlp.w_out" in names:
        return "merged"
    if any(name.startswith(("mlp.norm1.", "mlp.norm2.")) for name in names):
        return "training"
    if any(name.startswith("mlp.norm") for name in names):
        return None
    fc1 = state.get(f"{block}mlp.fc1.weight")
    square = fc1 is not None and fc1.dim() == 2 and fc1.shape[0] == fc1.shape[1]
    return "deployed" if "mlp.fc3.weight" in names or square else None


def block_names(state: Mapping[str, Tensor], family: Family) -> list[str]:
    """Prefixes of the blocks that have keys, in order: "blocks.0." or "layers.0.blocks.0."."""
    matches = {match[0]: tuple(map(int, match.groups())) for key in state if (match := BLOCK[family].match(key))}
    return sorted(matches, key=matches.__getitem__)


# --- theirs → ours ----------------------------------------------------------------------------------------------------


def to_native(state: Mapping[str, Tensor], family: Family, form: StateForm) -> dict[str, Tensor]:
    """Our keys for the authors': deployed FFNs renamed, derived buffers (index, mask) dropped."""
    native = {key: value for key, value in state.items() if not DERIVED.search(key)}
    if form != "deployed":
        return native
    for block in block_names(state, family):
        mlp = f"{block}mlp."
        for theirs, ours in DEPLOYED_NAMES.items():
            if mlp + theirs in native:
                native[mlp + ours] = native.pop(mlp + theirs)
        # m = 0: the authors store no way in or out, we store empty ones
        if mlp + "bias" in native and not any(mlp + name in native for name in ("w_in", "b_in", "w_out")):
            bias = native[mlp + "bias"]
            dim = bias.shape[0]
            native |= {
                mlp + "w_in": bias.new_zeros(0, dim),
                mlp + "b_in": bias.new_zeros(0),
                mlp + "w_out": bias.new_zeros(dim, 0),
            }
    return native


def take_identities(native: dict[str, Tensor]) -> set[str]:
    """Remove every w_merged that is exactly I; returns the names of its FFNs.

    That is how the authors store an FFN without idle channels: the shortcut alone, which we add instead.
    """
    suffix = ".w_merged"
    found = {key for key, value in native.items() if key.endswith(suffix) and is_identity(value)}
    for key in found:
        del native[key]
    return {key.removesuffix(suffix) for key in found}


def their_names(native_names: Sequence[str]) -> list[str]:
    """The authors' names of our deployed keys, for messages about their files."""
    theirs = {ours: name for name, ours in DEPLOYED_NAMES.items()}
    return [re.sub(r"(?<=\.mlp\.)(\w+)$", lambda match: theirs.get(match[1], match[1]), name) for name in native_names]


# --- ours → theirs ----------------------------------------------------------------------------------------------------


def to_authors(model: nn.Module, img_size: tuple[int, int] | None) -> dict[str, Tensor]:
    """State dict of a ViT or Swin in the authors' keys, training or deployed as its FFNs are.

    Shortcuts that stand beside w_merged go back into it. In bf16 and fp16 that is refused where it would round.

    Args:
        model: :class:`VisionTransformer` or :class:`SwinTransformer`.
        img_size: (height, width) in pixels, which a Swin's masks depend on.

    Raises:
        ValueError: the layout has no place for something in the model; says what and the fix.
    """
    family = next((family for family, cls in CLASSES.items() if type(model) is cls), None)
    if family is None:
        raise ValueError(
            f"model: got a {type(model).__name__}, wanted a VisionTransformer or SwinTransformer for layout='authors'; "
            "save it with layout='native'"
        )
    for name, module in model.named_modules():
        if isinstance(module, RepAttention | PatchProjection):
            raise ValueError(_no_place(name, module))
    if isinstance(model, SwinTransformer) and img_size is not None:
        check_windows_divide(model, img_size)
    state = dict(model.state_dict())
    for name, mlp in ffns(model):
        if isinstance(mlp, PartialGELUFFN):
            prefix = f"{name}."
            own = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
            state |= {prefix + key: value for key, value in _deployed_ffn(name, mlp, own).items()}
        elif not isinstance(mlp, ChannelIdleFFN):
            raise ValueError(_no_place(name, mlp))
    return state | derived_buffers(model, img_size)


def ffns(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The FFN of every block, with its name."""
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            yield name, module


def _no_place(name: str, module: nn.Module) -> str:
    return (
        f"model: got a {type(module).__name__} at {name}, for which the authors' layout has no keys; save before "
        "fusing (reparameterize alone keeps the layout), or save with layout='native'"
    )


def _deployed_ffn(name: str, mlp: PartialGELUFFN, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if mlp.norm_eps is not None or mlp.approximate != "none":
        raise ValueError(_no_place(name, mlp))
    like = own[f"{name}.w_in"]
    zero = like.new_zeros(mlp.dim)
    state = {"fc1.weight": _merged_matrix(name, mlp, own), "fc1.bias": own.get(f"{name}.bias", zero)}
    if mlp.act_channels:
        state["fc2.weight"] = like
        state["fc2.bias"] = own.get(f"{name}.b_in", like.new_zeros(mlp.act_channels))
        state["fc3.weight"] = own[f"{name}.w_out"]
    return state


def _merged_matrix(name: str, mlp: PartialGELUFFN, own: Mapping[str, Tensor]) -> Tensor:
    """w_merged with the shortcut folded in: what the authors' fc1 holds."""
    w = own.get(f"{name}.w_merged")
    w = own[f"{name}.w_in"].new_zeros(mlp.dim, mlp.dim) if w is None else w
    if not mlp.residual:
        return w
    exact = fold_identity(w)
    folded = exact.to(w.dtype)
    if folded.dtype.itemsize < 4 and not torch.equal(folded.double(), exact):
        raise ValueError(
            f"model: got {name} in {w.dtype} with its shortcut beside w_merged; the authors' layout stores I + "
            "w_merged, which would lose w_merged to rounding; save model.float(), or use layout='native'"
        )
    return folded


# --- what Swin's weights do not need ----------------------------------------------------------------------------------


def derived_buffers(model: nn.Module, img_size: tuple[int, int] | None) -> dict[str, Tensor]:
    """The buffers that the authors' Swin stores though they follow from its arguments; {} for other models.

    ``relative_position_index`` of every block; ``attn_mask`` [windows, N, N] of shifted blocks, where the map is
    larger than the window and divisible by it. Without ``img_size``: the index only.
    """
    if not isinstance(model, SwinTransformer):
        return {}
    buffers: dict[str, Tensor] = {}
    for name, attn in model.named_modules():
        if not isinstance(attn, WindowAttention):
            continue
        stage = int(name.split(".")[1])
        table = attn.relative_position_bias_table
        on_meta = table.is_meta  # a model to be loaded: its buffers are compared with those of a file
        device, dtype = (torch.device("cpu"), torch.float32) if on_meta else (table.device, table.dtype)
        buffers[f"{name}.relative_position_index"] = relative_position_index(attn.window[0]).to(device)
        if img_size is None:
            continue
        size = map_size(img_size, model.patch_size, stage)
        whole = all(side % attn.window[0] == 0 for side in size)
        if any(attn.shift) and min(size) > attn.window[0] and whole:
            mask = shift_mask(size, attn.window, attn.shift, dtype, device)
            buffers[name.removesuffix("attn") + "attn_mask"] = mask
    return buffers


def check_windows_divide(model: SwinTransformer, img_size: tuple[int, int]) -> None:
    """Raise ValueError unless windows divide every map of these images, as the authors' Swin wants (ours pads)."""
    for stage, layer in enumerate(model.layers):
        size = map_size(img_size, model.patch_size, stage)
        for attn in (module for module in layer.modules() if isinstance(module, WindowAttention)):
            if any(side % attn.window[0] for side in size):
                raise ValueError(
                    f"img_size: got {img_size}, which gives stage {stage} a map of {size}, wanted one that its windows "
                    f"of {attn.window[0]} divide, since the authors' Swin does not pad; use layout='native'"
                )


def map_size(img_size: tuple[int, int], patch_size: int, stage: int) -> tuple[int, int]:
    """Height and width in tokens of a Swin stage's map."""
    height, width = (side // patch_size // 2**stage for side in img_size)
    return height, width


def _some(names: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
