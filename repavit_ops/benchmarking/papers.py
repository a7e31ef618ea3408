"""What the papers print, as data: every row of the tables that ``repavit-ops bench method`` stands beside.

RePaViT (ICML 2025, arXiv 2505.21847): Tables 1, 2, 3, 4, 8 and 9; images per second on one A6000 at batch 128 with
FlashAttention. Depth compression (arXiv 2511.19718): its abstract's one figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VANILLA, TRAINING, DEPLOYED, JOINED, OTHER = "vanilla", "training", "deployed", "joined", "other"


@dataclass(frozen=True)
class PaperRow:
    """One row of a table.

    Attributes:
        table: "1", …; label: the row's name. family: model of the registry without its prefix.
        form: "vanilla", "training", "deployed"; "joined" for merged branches; "other" for methods of other papers.
        idle_ratio: θ; None for vanilla rows, and for the registry's default, which LV-ViT's "0.75" is: m = C, θ = 2/3.
        mparams, gmacs, speed, accuracy: as printed: millions, billions, images per second, percent; None where absent.
        gain: of Table 2, percent over the backbone's speed.
    """

    table: str
    label: str
    family: str
    form: str
    idle_ratio: float | None = None
    mparams: float | None = None
    gmacs: float | None = None
    speed: float | None = None
    accuracy: float | None = None
    gain: float | None = None

    @property
    def model(self) -> str:
        """Name in the registry."""
        prefix = self.form if self.form in (VANILLA, JOINED) else "repa"
        return f"{prefix}_{self.family}"

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of create_model."""
        return {} if self.idle_ratio is None else {"idle_ratio": self.idle_ratio}

    @property
    def attention_products(self) -> bool:
        """Whether the row's GMACs count q kᵀ and p v: CLIP's do, no others."""
        return self.family.startswith("clip")


TITLES = {
    "deit_tiny": "DeiT-Tiny",
    "deit_small": "DeiT-Small",
    "deit_base": "DeiT-Base",
    "vit_large": "ViT-Large",
    "vit_huge": "ViT-Huge",
    "swin_tiny": "Swin-Tiny",
    "swin_small": "Swin-Small",
    "swin_base": "Swin-Base",
    "lvvit_s": "LV-ViT-S",
    "lvvit_m": "LV-ViT-M",
    "dino_vit_s": "ViT-Small",
    "dino_vit_b": "ViT-Base",
    "clip_vit_b32": "CLIP-ViT-B/32",
    "clip_vit_b16": "CLIP-ViT-B/16",
}


def _repa(table: str, family: str, form: str, theta: float | None, *figures: float | None) -> PaperRow:
    ratio = "" if form == VANILLA else f"/{0.75 if theta is None else theta:.2f}"
    label = TITLES[family] if form == VANILLA else f"RePa-{TITLES[family]}{ratio}"
    return PaperRow(table, label, family, form, theta, *figures)


# family, θ; MParam, GMACs, images/s, top-1 of the vanilla backbone, of the training form, deployed
_TABLE_1: list[tuple[str, float | None, tuple[float, ...], tuple[float, ...], tuple[float, ...]]] = [
    ("deit_tiny", 0.5, (5.7, 1.1, 3435.1, 72.1), (5.7, 1.1, 2397.9, 69.4), (4.4, 0.8, 4001.2, 69.4)),
    ("deit_small", 0.5, (22.1, 4.3, 1410.3, 79.8), (22.1, 4.3, 1000.9, 78.9), (16.7, 3.2, 1734.7, 78.9)),
    ("deit_base", 0.75, (86.6, 16.9, 418.5, 81.8), (86.6, 16.9, 336.6, 81.3), (51.1, 9.9, 660.3, 81.3)),
    ("vit_large", 0.75, (304.3, 59.7, 124.2, 80.3), (304.5, 59.8, 102.7, 82.0), (178.4, 34.9, 207.2, 82.0)),
    ("vit_huge", 0.75, (632.2, 124.3, 61.5, 80.3), (632.5, 124.4, 53.0, 81.4), (369.9, 72.6, 103.8, 81.4)),
    ("swin_tiny", 0.75, (28.3, 4.4, 804.4, 81.2), (28.3, 4.4, 614.9, 78.4), (17.5, 2.6, 1020.4, 78.4)),
    ("swin_small", 0.75, (49.6, 8.6, 471.7, 83.0), (49.7, 8.6, 363.1, 81.4), (29.9, 5.1, 627.8, 81.4)),
    ("swin_base", 0.75, (87.8, 15.2, 326.6, 83.5), (87.9, 15.2, 249.4, 82.6), (52.8, 9.0, 467.6, 82.6)),
    ("lvvit_s", None, (26.2, 6.1, 866.6, 81.4), (26.2, 6.1, 725.4, 81.6), (19.1, 4.7, 1110.9, 81.6)),
    ("lvvit_m", None, (55.8, 11.9, 457.6, 83.6), (55.9, 11.9, 396.6, 83.5), (40.1, 8.8, 640.6, 83.5)),
]
# family; figures by θ, None for the vanilla backbone
_TABLE_4: dict[str, dict[float | None, tuple[float, ...]]] = {
    "deit_tiny": {
        None: (5.7, 1.1, 3435.1, 72.1),
        0.25: (5.3, 1.0, 3575.6, 71.9),
        0.5: (4.4, 0.8, 4001.2, 69.4),
        0.75: (3.5, 0.6, 4470.8, 64.2),
        1.0: (2.6, 0.5, 5810.1, 48.6),
    },
    "deit_small": {
        None: (22.1, 4.3, 1410.3, 79.8),
        0.25: (20.3, 3.9, 1489.7, 80.3),
        0.5: (16.7, 3.2, 1734.7, 78.9),
        0.75: (13.2, 2.5, 2003.7, 77.0),
        1.0: (9.6, 1.8, 2612.9, 63.9),
    },
    "deit_base": {
        None: (86.6, 16.9, 418.5, 81.8),
        0.25: (79.5, 15.5, 452.3, 81.1),
        0.5: (65.3, 12.7, 538.0, 81.4),
        0.75: (51.1, 9.9, 660.3, 81.3),
        1.0: (37.0, 7.1, 878.7, 73.7),
    },
    "swin_tiny": {
        None: (28.3, 4.4, 804.4, 81.2),
        0.25: (26.1, 4.0, 844.8, 81.4),
        0.5: (21.8, 3.3, 905.9, 80.5),
        0.75: (17.5, 2.6, 1020.4, 78.4),
        1.0: (13.2, 1.9, 1180.1, 67.6),
    },
    "swin_small": {
        None: (49.6, 8.6, 471.7, 83.0),
        0.25: (45.7, 7.9, 514.5, 83.1),
        0.5: (37.8, 6.5, 569.2, 82.8),
        0.75: (29.9, 5.1, 627.8, 81.4),
        1.0: (22.1, 3.7, 745.0, 72.5),
    },
    "swin_base": {
        None: (87.8, 15.2, 326.6, 83.5),
        0.25: (80.8, 14.0, 356.3, 83.7),
        0.5: (66.8, 11.5, 390.6, 83.4),
        0.75: (52.8, 9.0, 467.6, 82.6),
        1.0: (38.8, 6.5, 539.0, 75.5),
    },
}
# DINO: its linear top-1
_TABLE_8: dict[str, dict[float | None, tuple[float, ...]]] = {
    "dino_vit_s": {None: (21.7, 4.3, 1277.0, 77.0), 0.75: (12.8, 2.5, 1779.6, 74.4)},
    "dino_vit_b": {None: (85.8, 16.9, 396.2, 78.2), 0.75: (50.4, 9.9, 623.0, 77.0)},
}
_TABLE_9: dict[str, dict[float | None, tuple[float, ...]]] = {
    "clip_vit_b32": {
        None: (87.9, 4.4, 3860.2, 57.1),
        0.5: (66.6, 3.4, 4893.5, 56.8),
        0.75: (52.4, 2.6, 5812.3, 53.2),
    },
    "clip_vit_b16": {
        None: (86.2, 17.6, 824.2, 62.7),
        0.5: (64.9, 13.4, 1027.9, 63.5),
        0.75: (50.8, 10.6, 1161.5, 61.0),
    },
}
# backbone; method (or θ of RePaViT), MParam, GMACs, percent of speed gained, top-1
_TABLE_2: dict[str, list[tuple[str | float, float | None, float, float | None, float]]] = {
    "deit_small": [
        ("WDPruning", 13.3, 2.6, 18.3, 78.4),
        ("X-pruner", None, 2.4, None, 78.9),
        ("DC-ViT", 16.6, 3.2, 20.0, 78.6),
        ("LPViT", 22.1, 2.3, 16.3, 80.7),
        (0.5, 16.7, 3.2, 23.0, 78.9),
        (0.75, 13.2, 2.5, 42.1, 77.0),
    ],
    "deit_base": [
        ("WDPruning", 55.3, 9.9, 18.2, 80.8),
        ("X-pruner", None, 8.5, None, 81.0),
        ("DC-ViT", 65.1, 12.7, 18.4, 81.3),
        ("LPViT", 86.6, 8.8, 18.8, 80.8),
        (0.5, 65.3, 12.7, 28.6, 81.4),
        (0.75, 51.1, 10.6, 57.8, 81.3),
    ],
    "swin_small": [
        ("WDPruning", 32.8, 6.3, 15.3, 81.8),
        ("X-pruner", None, 6.0, None, 82.0),
        (0.5, 37.8, 6.4, 20.7, 82.8),
        (0.75, 29.9, 5.1, 33.1, 81.4),
    ],
    "swin_base": [
        ("DC-ViT", 66.4, 11.5, 14.9, 83.8),
        ("LPViT", 87.8, 11.2, 8.9, 81.7),
        (0.5, 66.8, 11.5, 19.6, 83.4),
        (0.75, 52.8, 9.0, 42.4, 82.6),
    ],
}


def _by_ratio(table: str, rows: dict[str, dict[float | None, tuple[float, ...]]]) -> list[PaperRow]:
    return [
        _repa(table, family, VANILLA if theta is None else DEPLOYED, theta, *figures)
        for family, by_ratio in rows.items()
        for theta, figures in by_ratio.items()
    ]


def _table_2() -> list[PaperRow]:
    rows = []
    for family, methods in _TABLE_2.items():
        vanilla = _TABLE_4[family][None]
        rows.append(_repa("2", family, VANILLA, None, *vanilla))
        for method, mparams, gmacs, gain, accuracy in methods:
            if isinstance(method, str):
                rows.append(PaperRow("2", method, family, OTHER, None, mparams, gmacs, None, accuracy, gain))
            else:
                rows.append(_repa("2", family, DEPLOYED, method, mparams, gmacs, None, accuracy, gain))
    return rows


TABLES: dict[str, list[PaperRow]] = {
    "1": [
        _repa("1", family, form, None if form == VANILLA else theta, *figures)
        for family, theta, *forms in _TABLE_1
        for form, figures in zip((VANILLA, TRAINING, DEPLOYED), forms, strict=True)
    ],
    "2": _table_2(),
    "3": [
        PaperRow("3", "SLAB-DeiT-Base", "slab_deit_base", OTHER, None, 86.6, 17.1, 387.0, 78.9),
        _repa("3", "deit_base", DEPLOYED, 0.25, 79.5, 15.5, 452.3, 81.1),
        PaperRow("3", "SLAB-Swin-Base", "slab_swin_base", OTHER, None, 87.7, 15.4, 299.9, 83.6),
        _repa("3", "swin_base", DEPLOYED, 0.25, 80.8, 14.0, 356.3, 83.7),
    ],
    "4": _by_ratio("4", _TABLE_4),
    "8": _by_ratio("8", _TABLE_8),
    "9": _by_ratio("9", _TABLE_9),
    "depth": [
        PaperRow("depth", "ViT-Tiny, 12 blocks", "vit_tiny", VANILLA),
        *(PaperRow("depth", f"ViT-Tiny, {blocks} blocks", f"vit_tiny_{blocks}", JOINED) for blocks in (6, 4, 3)),
    ],
}

# Rows whose digits are not what their model counts: table, label, form. NOTES say why, where it is known.
MISPRINTED = {
    ("1", "RePa-ViT-Large/0.75", TRAINING),
    ("1", "RePa-ViT-Huge/0.75", TRAINING),
    ("1", "RePa-Swin-Small/0.75", TRAINING),
    ("1", "RePa-LV-ViT-S/0.75", DEPLOYED),
    ("2", "RePa-DeiT-Base/0.75", DEPLOYED),
    ("2", "RePa-Swin-Small/0.50", DEPLOYED),
    ("3", "RePa-Swin-Base/0.25", DEPLOYED),
    ("4", "RePa-Swin-Base/0.25", DEPLOYED),
    ("9", "CLIP-ViT-B/32", VANILLA),
}
SPEEDS = "the paper's ratios are of one A6000 at batch 128, ours of this machine"
NOTES: dict[str, tuple[str, ...]] = {
    "1": (
        SPEEDS,
        "training forms of ViT-Large, ViT-Huge and Swin-Small are printed with up to 0.15 GMACs more than counted "
        "here, as if their BatchNorms counted",
        'LV-ViT\'s "0.75" is ρ = 3, m = C, θ = 2/3: only so do its parameters come out',
    ),
    "2": (
        SPEEDS,
        "RePa-DeiT-Base/0.75 is printed with 10.6 GMACs, in Tables 1 and 4 with 9.9; RePa-Swin-Small/0.50 with 6.4, in "
        "Table 4 with 6.5; RePa-Swin-Base/0.75 with +42.4 %, in Table 1 with +43.2 %",
        "methods without a form are quoted from the paper, which quotes their own papers",
    ),
    "3": (
        SPEEDS,
        "SLAB's published code adds a position to the keys of linear attention: 1.8 M parameters of SLAB-DeiT-Base, "
        "1.2 M of SLAB-Swin-Base, which the printed 86.6 M and 87.7 M do not hold",
        "SLAB's GMACs are with attention's products, which the other Swin rows leave out; SLAB-Swin-Base has 15.42 of "
        "them, printed as 15.4, and 0.03 in its biases",
    ),
    "4": (SPEEDS,),
    "8": (
        SPEEDS,
        "ViT-Base is Table 1's DeiT-Base without its head, and is printed with 396.2 images/s, that one with 418.5",
    ),
    "9": (SPEEDS, "headed GFLOPs, these are MACs, and with q kᵀ and p v, which the other tables leave out"),
    "depth": ("the paper's abstract: up to 37 % less latency on mobile CPUs, a ratio of 1.59",),
}
