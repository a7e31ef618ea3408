"""A model's constructor arguments from the shapes of the authors' state dict, settled with what the caller says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..models.patch_embed import pair
from ..models.schedule import block_act_channels, linear_idle_ratios
from ..reparam import active_channels
from .authors_layout import Family, StateForm, block_names

# Arguments for which the authors' keys leave one meaning only, and what another would be.
FIXED: dict[str, tuple[Any, str]] = {
    "feature_norm": ("BatchNorm", "only a BatchNorm folds into the FFN"),
    "channel_idle": (True, "a model without idle channels is no RePaViT"),
    "fc_norm": (False, "the final norm stands in front of the pooling"),
    "no_embed_class": (False, "the class token has a position"),
    "qk_scale": (None, "the scale is 1/√d"),
}
IDLENESS = ("idle_ratio", "act_channels", "heuristic")
COMMON = ("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "num_heads", "mlp_ratio", "qkv_bias")
OPTIONS = ("head_bias", "drop_path_rate", "drop_rate")
KNOWN: dict[str, tuple[str, ...]] = {
    "vit": (*COMMON, "depth", "pre_norm", "norm_eps", "block_norm_eps", "global_pool", *OPTIONS),
    "swin": (*COMMON, "depths", "window_size", "norm_eps", *OPTIONS),
}
PROJ = "attn.proj.weight"
BIAS_TABLE = "attn.relative_position_bias_table"
PUBLISHED_HEADS = "192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16"


def settle(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """One config from several, later ones winning; who says how many channels idle says all of it.

    Raises:
        ValueError: a value that no model here has, or a family that is not known.
    """
    config: dict[str, Any] = {}
    for layer in layers:
        if any(layer.get(name) is not None for name in ("idle_ratio", "act_channels")):
            config = {name: value for name, value in config.items() if name not in IDLENESS}
        config |= {name: value for name, value in layer.items() if value is not None}
    for name, (wanted, reason) in FIXED.items():
        if name in config and config[name] != wanted:
            raise ValueError(f"{name}: got {config[name]!r}, wanted {wanted!r}; {reason}")
    if config.get("family", "vit") not in KNOWN:
        raise ValueError(f"family: got {config['family']!r}, wanted one of {', '.join(KNOWN)}")
    for name in ("patch_size", "window_size"):
        if isinstance(config.get(name), Sequence) and len(set(config[name])) == 1:
            config[name] = config[name][0]
    return config


def constructor_arguments(
    state: Mapping[str, Tensor], family: Family, form: StateForm, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of the family's class, without those of its FFNs: shapes first, the config where they are silent.

    A quantity whose key is missing or misshapen gets the config's value or any: the comparison of keys that follows
    reports the key.

    Raises:
        ValueError: shapes and config contradict each other (every contradiction is named), or neither gives a ViT's
            number of heads.
    """
    if config.get("family", family) != family:
        raise ValueError(f"family: got {config['family']!r}, but the keys are those of {family!r}")
    implied = _Implied(config)
    blocks = block_names(state, family)
    (_vit if family == "vit" else _swin)(state, blocks, implied)
    _stem_and_head(state, implied)
    if form == "training":
        _mlp_ratio(state, blocks, implied)
    arguments = implied.settled()
    arguments |= {name: config[name] for name in KNOWN[family] if name in config and name not in arguments}
    if family == "vit" and "num_heads" not in arguments:
        raise ValueError(
            f"num_heads: got nothing, and shapes do not tell it (C = {arguments['embed_dim']}); pass num_heads=h "
            f"(published models, C: h: {PUBLISHED_HEADS})"
        )
    return arguments


class _Implied:
    """What shapes say, collected against what the config says."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.values: dict[str, Any] = {}
        self.contradictions: list[str] = []

    def add(self, name: str, value: Any, source: str) -> None:
        """Record that ``source``, a key and its shape in words, means ``value``."""
        self.values[name] = value
        given = self.config.get(name)
        if given is not None and _comparable(given) != _comparable(value):
            self.contradictions.append(f"{name}: got {given}, but {source} means {value}")

    def fallback(self, name: str, value: Any) -> None:
        self.values.setdefault(name, self.config.get(name, value))

    def settled(self) -> dict[str, Any]:
        if self.contradictions:
            raise ValueError(
                "config contradicts the state dict: " + "; ".join(self.contradictions) + "; correct it or leave it out"
            )
        return self.values


def _comparable(value: Any) -> Any:
    return [float(v) for v in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _shape(state: Mapping[str, Tensor], key: str, dims: int) -> tuple[int, ...] | None:
    """Shape of a key that is there and has ``dims`` dimensions; None otherwise."""
    value = state.get(key)
    return tuple(value.shape) if value is not None and value.dim() == dims else None


def _commonest(values: Iterable[int | None]) -> int | None:
    """The value that most agree on, so that one damaged tensor is reported rather than believed; None for no values."""
    counts = Counter(value for value in values if value is not None)
    return counts.most_common(1)[0][0] if counts else None


def _at(key: str, shape: Sequence[int]) -> str:
    return f"{key} {list(shape)}"


def _stem_and_head(state: Mapping[str, Tensor], implied: _Implied) -> None:
    key = "patch_embed.proj.weight"
    if (shape := _shape(state, key, 4)) is not None and shape[2] == shape[3]:
        implied.add("in_chans", shape[1], _at(key, shape))
    if (shape := _shape(state, "head.weight", 2)) is not None:
        implied.add("num_classes", shape[0], _at("head.weight", shape))
    elif (shape := _shape(state, "head.bias", 1)) is not None:
        implied.add("num_classes", shape[0], _at("head.bias", shape))
    implied.fallback("num_classes", 0)


def _embed_dim(state: Mapping[str, Tensor], widths: Mapping[str, int], implied: _Implied) -> None:
    """C of the stem: the stem and every block, ``widths`` times as wide, have a vote."""
    votes = [shape[0] // width for block, width in widths.items() if (shape := _shape(state, f"{block}{PROJ}", 2))]
    for key, dims in {"patch_embed.proj.weight": 4, "patch_embed.norm.weight": 1, "norm_pre.weight": 1}.items():
        if (shape := _shape(state, key, dims)) is not None:
            votes.append(shape[0])
    if (dim := _commonest(votes)) is not None:
        block, width = next(iter(widths.items()))
        implied.add("embed_dim", dim, _at(f"{block}{PROJ}", (dim * width, dim * width)))
    implied.fallback("embed_dim", 1)


def _patch_size(state: Mapping[str, Tensor], implied: _Implied) -> int:
    key = "patch_embed.proj.weight"
    if (shape := _shape(state, key, 4)) is not None and shape[2] == shape[3]:
        implied.add("patch_size", shape[2], _at(key, shape))
    implied.fallback("patch_size", 16)
    return int(implied.values["patch_size"])


def _vit(state: Mapping[str, Tensor], blocks: Sequence[str], implied: _Implied) -> None:
    depth = max(int(block.split(".")[1]) for block in blocks) + 1
    implied.add("depth", depth, f"the last block, blocks.{depth - 1},")
    _embed_dim(state, dict.fromkeys(blocks, 1), implied)
    patch = _patch_size(state, implied)
    if (shape := _shape(state, "pos_embed", 3)) is not None:
        implied.values["img_size"] = _vit_image(shape, patch, implied)
    implied.fallback("img_size", patch)
    implied.fallback("pre_norm", any(key.startswith("norm_pre.") for key in state))
    implied.fallback("qkv_bias", any(f"{block}attn.qkv.bias" in state for block in blocks))


def _vit_image(shape: Sequence[int], patch: int, implied: _Implied) -> tuple[int, int]:
    """Image size of a position embedding [1, 1 + h·w, C]: the config's if it fits, else square."""
    patches = shape[1] - 1
    given = implied.config.get("img_size")
    if given is not None:
        height, width = pair(given if isinstance(given, int) else tuple(given))
        if (height // patch) * (width // patch) != patches:
            implied.contradictions.append(
                f"img_size: got {given}, which is {height // patch} x {width // patch} patches of {patch}, but "
                f"{_at('pos_embed', shape)} means {patches} patches and the class token"
            )
        return height, width
    side = math.isqrt(max(patches, 0))
    if side * side != patches or not side:
        raise ValueError(
            f"img_size: got nothing, and {_at('pos_embed', shape)} is no square of patches and a class token; pass "
            "img_size=(height, width)"
        )
    return side * patch, side * patch


def _swin(state: Mapping[str, Tensor], blocks: Sequence[str], implied: _Implied) -> None:
    stages: dict[int, list[str]] = {}
    for block in blocks:
        stages.setdefault(int(block.split(".")[1]), []).append(block)
    depths = [
        max((int(block.split(".")[3]) for block in stages.get(stage, [])), default=-1) + 1
        for stage in range(max(stages) + 1)
    ]
    implied.add("depths", depths, "the last block of each stage")
    _embed_dim(state, {block: 2**stage for stage, names in stages.items() for block in names}, implied)
    patch = _patch_size(state, implied)

    heads, windows = [], []
    for stage in range(len(depths)):
        tables = [_shape(state, f"{block}{BIAS_TABLE}", 2) for block in stages.get(stage, [])]
        whole = [table for table in tables if table is not None and _window(table[0]) is not None]
        heads.append(_commonest(table[1] for table in whole))
        windows.append(_commonest(_window(table[0]) for table in whole))
    if all(head is not None for head in heads):
        implied.add("num_heads", heads, f"the bias tables' {heads} columns")
    implied.fallback("num_heads", [head or 1 for head in heads])
    implied.values["window_size"], implied.values["img_size"] = _swin_window(state, stages, windows, patch, implied)
    implied.fallback("qkv_bias", any(f"{block}attn.qkv.bias" in state for block in blocks))


def _window(rows: int) -> int | None:
    """Window of a bias table of (2·window - 1)² rows; None for other numbers of rows."""
    side = math.isqrt(rows)
    return (side + 1) // 2 if side * side == rows and side % 2 else None


def _swin_window(
    state: Mapping[str, Tensor],
    stages: Mapping[int, Sequence[str]],
    windows: Sequence[int | None],
    patch: int,
    implied: _Implied,
) -> tuple[int, tuple[int, int] | None]:
    """Window and image size from the bias tables of each stage and the masks of shifted blocks.

    The image size is None where nothing tells it; then :func:`stand_in_image` gives one with the same windows.
    """
    known = [window for window in windows if window is not None]
    window = max(known, default=implied.config.get("window_size", 1))
    given = implied.config.get("img_size")
    image = None if given is None else pair(given if isinstance(given, int) else tuple(given))
    said = f"got {given}" if given is not None else ""
    for key, stage, tokens in _masked_maps(state, stages, windows):
        side = math.isqrt(tokens)
        if image is None and side * side == tokens:
            image = (side * patch * 2**stage,) * 2
            said = f"got {image[0]} by {key}"
        if image is not None and math.prod(edge // patch // 2**stage for edge in image) != tokens:
            shape = list(state[key].shape)
            implied.contradictions.append(f"img_size: {said}, but {key} {shape} means a map of {tokens} tokens")
    if (size := implied.config.get("window_size")) is not None:
        sides = [min(image) // patch // 2**stage if image else size for stage in range(len(windows))]
        wanted = [max(min(size, side), 1) for side in sides]
        if any(got is not None and got != want for got, want in zip(windows, wanted, strict=True)):
            implied.contradictions.append(
                f"window_size: got {size}, which is {wanted} in the stages, but the bias tables' rows mean {windows}"
            )
        window = size
    return window, image


def _masked_maps(
    state: Mapping[str, Tensor], stages: Mapping[int, Sequence[str]], windows: Sequence[int | None]
) -> Iterator[tuple[str, int, int]]:
    """Key and stage of every mask [windows, N, N], and how many tokens its map has."""
    for stage, blocks in stages.items():
        for block in blocks:
            shape, window = _shape(state, f"{block}attn_mask", 3), windows[stage]
            if shape is not None and window is not None:
                yield f"{block}attn_mask", stage, shape[0] * window**2


def stand_in_image(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> int:
    """An image side with the stages' windows, for a Swin whose masks and config are both gone."""
    last = len(arguments["depths"]) - 1
    table = _shape(state, f"layers.{last}.blocks.0.{BIAS_TABLE}", 2)
    window = None if table is None else _window(table[0])
    return (window or arguments["window_size"]) * int(arguments["patch_size"]) * 2**last


def _mlp_ratio(state: Mapping[str, Tensor], blocks: Sequence[str], implied: _Implied) -> None:
    dims = block_dims(implied.values)
    shapes = Counter(
        shape
        for block, dim in zip(blocks, dims, strict=False)
        if (shape := _shape(state, f"{block}mlp.fc1.weight", 2)) is not None and shape[1] == dim > 0
    )
    if shapes:
        (hidden, dim), _ = shapes.most_common(1)[0]
        given = implied.config.get("mlp_ratio")
        ratio = hidden / dim
        if int(dim * ratio) < hidden:  # the quotient was rounded down
            ratio = math.nextafter(ratio, math.inf)
        if given is not None and int(dim * given) != hidden:
            source = _at(f"{blocks[0]}mlp.fc1.weight", (hidden, dim))
            implied.contradictions.append(f"mlp_ratio: got {given}, but {source} means {ratio:g}")
        implied.values["mlp_ratio"] = ratio if given is None else given
    implied.fallback("mlp_ratio", 4.0)


def block_dims(arguments: Mapping[str, Any]) -> list[int]:
    """C of every block."""
    if "depths" not in arguments:
        return [arguments["embed_dim"]] * arguments["depth"]
    return [arguments["embed_dim"] * 2**stage for stage, depth in enumerate(arguments["depths"]) for _ in range(depth)]


def training_act_channels(config: Mapping[str, Any], hidden: Sequence[int], family: Family) -> list[int]:
    """Active channels m of each block of a training checkpoint, which does not hold them.

    Args:
        config: with act_channels (one or per block), or idle_ratio (one or per block) and perhaps heuristic.
        hidden: ρC of every block.

    Raises:
        ValueError: config gives neither or both, a wrong number of them, or an unknown heuristic.
    """
    ratio, counts = _flat(config.get("idle_ratio")), _flat(config.get("act_channels"))
    if ratio is None and counts is None:
        raise ValueError(
            "idle_ratio: got nothing, and a training checkpoint does not hold the number of active channels; pass "
            "idle_ratio=θ (one or per block; with heuristic='linear' if it was trained so) or act_channels=m"
        )
    if ratio is not None and not isinstance(ratio, list):
        ratio = _by_heuristic(ratio, config.get("heuristic"), len(hidden), family)
    return [m for m in block_act_channels(hidden, ratio, counts) if m is not None]


def check_deployed_act_channels(config: Mapping[str, Any], counts: Sequence[int], dims: Sequence[int]) -> None:
    """Raise ValueError if the config's idle ratio or act_channels contradict the m of a deployed state dict.

    A ratio is believed to be off by one channel: ceil(ρC(1 - θ)) hangs on the last bit of θ, the shapes do not.
    """
    ratio, given = _flat(config.get("idle_ratio")), _flat(config.get("act_channels"))
    if given is not None:
        wanted, slack = given if isinstance(given, list) else [given] * len(counts), 0
    elif ratio is not None and "mlp_ratio" in config:
        hidden = [int(dim * config["mlp_ratio"]) for dim in dims]
        family: Family = "vit" if len(set(dims)) == 1 else "swin"
        if not isinstance(ratio, list):
            ratio = _by_heuristic(ratio, config.get("heuristic"), len(hidden), family)
        ratio = ratio if isinstance(ratio, list) else [ratio] * len(counts)
        wanted, slack = [active_channels(h, r) for h, r in zip(hidden, ratio, strict=False)], 1
    else:
        return
    if len(wanted) != len(counts) or any(abs(w - m) > slack for w, m in zip(wanted, counts, strict=False)):
        name = "act_channels" if given is not None else "idle_ratio"
        raise ValueError(
            f"config contradicts the state dict: {name}: got {config[name]}, i.e. active channels {wanted}, but the "
            f"shapes of mlp.fc2.weight mean {list(counts)}; correct it or leave it out"
        )


def _flat(value: Any) -> Any:
    """A number as it is; a sequence, nested by stage or not, as a flat list."""
    if value is None or not isinstance(value, Sequence) or isinstance(value, str):
        return value
    return [leaf for item in value for leaf in (item if isinstance(item, Sequence) else [item])]


def _by_heuristic(ratio: float, heuristic: Any, depth: int, family: Family) -> float | list[float]:
    """One idle ratio, or one for each block under the authors' "linear" heuristic (of their ViT only)."""
    name = str(heuristic).strip().lower()
    if name in ("static", "none", "") or family == "swin":  # the authors' Swin takes a heuristic and ignores it
        return ratio
    if name == "linear":
        return linear_idle_ratios(ratio, depth)
    raise ValueError(f"heuristic: got {heuristic!r}, wanted 'static' or 'linear'")
