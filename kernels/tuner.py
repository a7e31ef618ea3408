"""Measures tiles on the GPU that is here and writes its table. Runs only when called: ``repavit-ops tune``.

    with tuning.recording() as products:
        model(x)                          # every product that the model looks up
    tune(products, x.device, folder)

Each product is first compared with PyTorch's own, then timed in a CUDA graph on random numbers, with enough copies of
the weights that they come from memory as in a model. What is right and fastest goes into the table, cuBLAS included;
a tile that spills registers does not.
"""

from __future__ import annotations

import datetime
import itertools
import json
import logging
import math
import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.testing import do_bench_cudagraph

from . import tuning
from .attention import attention, window_attention
from .attention_tiles import VENDOR as PYTORCH
from .attention_tiles import AttentionTile, fits_at_once
from .chips import Chip, chip_of
from .linear import linear
from .on_chip_ffn import on_chip_ffn
from .partial_gelu_ffn import two_launches, two_source
from .tuning import VENDOR, Config, OnChip, Product

Entry = dict[str, Any]  # of a table: fields of a Config that differ from their defaults
Timer = Callable[[Callable[[], Any]], float]

L2_BYTES = 100e6  # more than the cache of any GPU we know
LONGEST_STEP = 128  # along K, of all choices
SPILLS = {torch.float32: 16}  # bytes per thread that a table's tile may spill: one register too few, in exact products
MANY_ROWS = 2048  # from here on, tiles below 64 rows only read the weights more often
TILES = (  # (bm, bn, bk, warps, stages) of bf16 and fp16
    *((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4), (64, 256, 64, 4, 3)),
    *((128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (128, 128, 64, 4, 4), (128, 128, 128, 8, 3)),
    *((128, 64, 64, 4, 3), (128, 64, 64, 4, 4), (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4)),
    *((64, 64, 128, 4, 3), (64, 32, 64, 4, 4), (32, 128, 64, 4, 4), (32, 64, 64, 4, 4), (32, 64, 128, 4, 4)),
    *((32, 32, 128, 4, 4), (16, 128, 128, 4, 3), (16, 64, 64, 4, 5), (16, 64, 128, 4, 4), (16, 32, 128, 2, 5)),
)
FLOAT_TILES = (  # of fp32, with and without tf32
    *((128, 128, 32, 8, 3), (128, 64, 32, 8, 3), (128, 64, 32, 4, 3), (64, 128, 32, 4, 3), (64, 64, 32, 4, 3)),
    *((64, 64, 16, 4, 4), (64, 32, 32, 4, 3), (32, 64, 32, 4, 3), (32, 32, 32, 4, 3), (16, 32, 32, 2, 3)),
)
ON_CHIP = (
    *(OnChip(128, 64, 64, 8, 3), OnChip(128, 64, 64, 8, 2), OnChip(128, 32, 64, 8, 3), OnChip(128, 32, 64, 8, 2)),
    *(OnChip(64, 64, 64, 8, 2), OnChip(64, 32, 64, 8, 3), OnChip(64, 32, 64, 8, 2), OnChip(64, 32, 64, 4, 3)),
    *(OnChip(64, 64, 64, 4, 2), OnChip(32, 32, 64, 4, 3), OnChip(32, 64, 64, 4, 2), OnChip(16, 64, 64, 4, 2)),
)
ATTENTION = (
    *(AttentionTile(16), AttentionTile(32), AttentionTile(64), AttentionTile(64, warps=8), AttentionTile(128, warps=8)),
    *(AttentionTile(16, keys=64, stages=2), AttentionTile(32, keys=64, stages=2), AttentionTile(64, keys=32, stages=2)),
    *(AttentionTile(64, keys=64, stages=2), AttentionTile(64, keys=128, stages=2)),
    *(AttentionTile(128, keys=64, warps=8, stages=2), AttentionTile(128, keys=128, warps=8, stages=2)),
)
FLOAT_ATTENTION = (
    *(AttentionTile(16, keys=16), AttentionTile(32, keys=16), AttentionTile(32, keys=32)),
    *(AttentionTile(64, keys=16, warps=8), AttentionTile(64, keys=32, warps=8)),
)


@dataclass(frozen=True)
class Kind:
    """How products of one kind are made, run and varied.

    Args:
        operands: (product, device) → random tensors; what is read once per call comes first, weights after.
        activations: how many of them are not weights.
        run: (product, tensors, choice) → result; a choice of None is what stands against ours (cuBLAS, two launches).
        choices: (chip, product) → what is measured first.
        variants: choice → what is measured of the best of those.
        entry: choice (or None) → what the table says.
    """

    operands: Callable[[Product, torch.device], list[Tensor]]
    activations: int
    run: Callable[[Product, list[Tensor], Any], Tensor]
    choices: Callable[[Chip, Product], list[Any]]
    variants: Callable[[Chip, Product, Any], list[Any]]
    entry: Callable[[Any], Entry]


# --- products ---------------------------------------------------------------------------------------------------------


def _random(product: Product, device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Numbers ~ N(0, 1), weights (all but the first) ~ 1 / √fan_in."""
    tensors = [torch.randn(shape, device=device) * (shape[-1] ** -0.5 if i else 1) for i, shape in enumerate(shapes)]
    return [t.to(product.dtype) for t in tensors]


def _linear_operands(product: Product, device: torch.device) -> list[Tensor]:
    m, n, k = product.m, product.n, product.k
    return _random(product, device, (m, k), (n, k), (n,))


def _run_linear(product: Product, tensors: list[Tensor], config: Config | None) -> Tensor:
    activation = "gelu" if product.kind.endswith("_gelu") else "none"
    norm_eps = 1e-6 if "_norm" in product.kind else None
    return linear(*tensors, activation=activation, norm_eps=norm_eps, config=config or VENDOR)


def _two_source_operands(product: Product, device: torch.device) -> list[Tensor]:
    m, n, hidden = product.m, product.n, product.k - product.n
    z, w_merged, w_out, bias = _random(product, device, (m, n), (n, n), (n, hidden), (n,))
    return [z, *_random(product, device, (m, hidden)), w_merged, w_out, bias]


def _run_two_source(product: Product, tensors: list[Tensor], config: Config | None) -> Tensor:
    z, h, w_merged, w_out, bias = tensors
    return two_source(z, w_merged, h, w_out, bias, None, config or VENDOR)


def _ffn_operands(product: Product, device: torch.device) -> list[Tensor]:
    m, c, hidden = product.m, product.n, product.k
    return _random(product, device, (m, c), (hidden, c), (hidden,), (c, hidden), (c, c), (c,))


def _run_ffn(product: Product, tensors: list[Tensor], config: OnChip | None) -> Tensor:
    x, w_in, b_in, w_out, w_merged, bias = tensors
    if config is None:
        return two_launches(x, w_in, b_in, w_out, w_merged, bias, None, False, "gelu")
    return on_chip_ffn(x, w_in, b_in, w_out, w_merged, bias, None, False, "gelu", config)


def _heads_of(product: Product) -> int:
    """Heads of an attention of which only sequences times heads is known: as many as divide it, up to 16."""
    return max(heads for heads in (1, 2, 3, 4, 6, 8, 12, 16) if product.m % heads == 0)


def _attention_operands(product: Product, device: torch.device) -> list[Tensor]:
    heads = _heads_of(product)
    return _random(product, device, (product.m // heads, product.n, 3 * heads * product.k))


def _run_attention(product: Product, tensors: list[Tensor], tile: AttentionTile | None) -> Tensor:
    (qkv,) = tensors
    return attention(qkv, None, _heads_of(product), product.k, product.k**-0.5, config=tile or PYTORCH)


def _window_of(product: Product) -> tuple[int, int]:
    side = math.isqrt(product.n)
    return (side, side) if side * side == product.n else (1, product.n)


def _window_operands(product: Product, device: torch.device) -> list[Tensor]:
    """Maps of two windows, and a bias."""
    heads, (height, width) = _heads_of(product), _window_of(product)
    sequences = product.m // heads
    maps = (sequences // 2, 2 * height, width) if sequences % 2 == 0 else (sequences, height, width)
    return _random(product, device, (*maps, 3 * heads * product.k), (heads, product.n, product.n))


def _run_windows(product: Product, tensors: list[Tensor], tile: AttentionTile | None) -> Tensor:
    qkv, rel_bias = tensors
    window = _window_of(product)
    shift = (window[0] // 2, window[1] // 2)
    static = (_heads_of(product), product.k, product.k**-0.5, window, shift, False)
    return window_attention(qkv, rel_bias, None, *static, config=tile or PYTORCH)


# --- choices ----------------------------------------------------------------------------------------------------------


def _tiles(chip: Chip, product: Product) -> list[Config]:
    """Tiles that fit the chip's memory and do not exceed the product by more than one doubling."""
    single = product.dtype == torch.float32
    tiles = [Config(*tile, tma=chip.has_tma and not single) for tile in (FLOAT_TILES if single else TILES)]
    if chip.backend == "hip":
        tiles = list(dict.fromkeys(replace(tile, stages=2) for tile in tiles))
    return [
        tile
        for tile in tiles
        if tile.shared_memory(product.dtype.itemsize) <= chip.shared_memory
        and tile.bm < 2 * max(product.m, 16)
        and tile.bn < 2 * max(product.n, 16)
        and (tile.bm >= 64 or product.m < MANY_ROWS)
    ]


def _tile_variants(chip: Chip, product: Product, config: Config) -> list[Config]:
    """Other epilogues, persistent programs, pointers instead of descriptors, the norm in the prologue; what fits."""
    split = [replace(config, split=not config.split)]
    tiles = config.grid(chip, product.m, product.n)[0]
    persistent = [replace(config, persistent=p) for p in (1, 2) if tiles > p * chip.processors]
    pointers = [replace(config, tma=False)] if config.tma else []
    prologue = [replace(config, norm_prologue=True)] if "_norm" in product.kind else []
    variants = [*split, *persistent, *pointers, *prologue]
    return [v for v in variants if v.shared_memory(product.dtype.itemsize) <= chip.shared_memory]


def _on_chip_tiles(chip: Chip, product: Product) -> list[OnChip]:
    if product.dtype == torch.float32:
        return []
    tiles = [replace(tile, tma=chip.has_tma) for tile in ON_CHIP]
    memory = chip.shared_memory
    return [tile for tile in tiles if tile.shared_memory(product.dtype.itemsize, product.n) <= memory]


def _attention_tiles(chip: Chip, product: Product) -> list[AttentionTile]:
    """At once where that fits the registers; online where there are several steps, long ones on sm_90 alone."""
    single = product.dtype == torch.float32
    at_once = fits_at_once(chip, product.dtype, product.n, product.k)
    longest = 128 if chip.arch == 90 else 64
    return [
        tile
        for tile in (FLOAT_ATTENTION if single else ATTENTION)
        if tile.queries < 2 * max(product.n, 16)
        and (tile.keys < product.n and tile.keys <= longest if tile.keys else at_once)
    ]


def _attention_variants(chip: Chip, product: Product, tile: AttentionTile) -> list[AttentionTile]:
    """A tile for the queries left over, several windows per program, other pipelines."""
    if tile.keys:
        return [] if product.dtype == torch.float32 else [replace(tile, stages=3)]
    tail = replace(tile, tail=True)  # two forms of a larger tile in one kernel would not fit its registers
    tails = [tail] if tile.queries < 64 and tail.queries_of_tail(product.n) else []
    if product.kind != "window_attention":
        return tails
    groups = [replace(tile, group=group, stages=stages) for group in (2, 4, 8, 16) for stages in (1, 2)]
    return [*tails, *(group for group in groups if product.m >= group.group * chip.processors)]


def _differing(config: Config | OnChip | AttentionTile) -> Entry:
    """Fields without those at their default."""
    defaults = {name: field.default for name, field in type(config).__dataclass_fields__.items()}
    return {name: value for name, value in asdict(config).items() if value != defaults[name]}


def _tile_entry(config: Config | AttentionTile | None) -> Entry:
    return {"vendor": True} if config is None else _differing(config)


_LINEAR = Kind(_linear_operands, 1, _run_linear, _tiles, _tile_variants, _tile_entry)
_TWO_SOURCE = Kind(_two_source_operands, 2, _run_two_source, _tiles, _tile_variants, _tile_entry)
_ON_CHIP = Kind(
    _ffn_operands,
    1,
    _run_ffn,
    _on_chip_tiles,
    lambda chip, product, tile: [replace(tile, tma=False)] if tile.tma else [],
    lambda tile: {} if tile is None else _differing(tile),
)
_ATTENTION = Kind(_attention_operands, 1, _run_attention, _attention_tiles, _attention_variants, _tile_entry)
_WINDOWS = Kind(_window_operands, 1, _run_windows, _attention_tiles, _attention_variants, _tile_entry)
# In the order in which they are tuned: the FFN on chip is compared with two launches from the table.
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("linear", "linear_norm", "linear_gelu", "linear_norm_gelu"), _LINEAR),
    "two_source": _TWO_SOURCE,
    "on_chip": _ON_CHIP,
    "attention": _ATTENTION,
    "window_attention": _WINDOWS,
}


# --- measuring --------------------------------------------------------------------------------------------------------


def graph_microseconds(call: Callable[[], Any]) -> float:
    """Median time of one call in µs, in a CUDA graph of about 5 ms."""
    return 1e3 * do_bench_cudagraph(call, rep=5, return_mode="median")


@dataclass(frozen=True)
class Measured:
    """Times in µs of one product: of the best choice, and of what stands against it."""

    product: Product
    entry: Entry
    ours: float
    theirs: float

    def __str__(self) -> str:
        p = self.product
        return (
            f"{p.kind:<18} {str(p.dtype).removeprefix('torch.'):<9} m {p.m:>6} n {p.n:>5} k {p.k:>5}  "
            f"{self.ours:9.2f} us, rival {self.theirs:9.2f} us ({self.theirs / self.ours:.2f}x)  {self.entry}"
        )


def measure(product: Product, device: torch.device, timer: Timer = graph_microseconds) -> Measured:
    """Find the fastest right choice for one product. Choices that do not compile, fit or agree are left out."""
    kind, chip = KINDS[product.kind], chip_of(device)
    tensors = kind.operands(product, device)
    weights = tensors[kind.activations :]
    size = sum(t.nbytes for t in weights)
    copies = min(16, max(1, round(L2_BYTES / max(size, 1))))
    sets = [tensors] + [tensors[: kind.activations] + [w.clone() for w in weights] for _ in range(copies - 1)]
    truth = kind.run(product, tensors, None)

    def time_of(choice: Any) -> float:
        turns = itertools.cycle(sets)
        return timer(lambda: kind.run(product, next(turns), choice))

    def times_of(choices: Iterable[Any]) -> dict[Any, float]:
        return {choice: time_of(choice) for choice in choices if _agrees(kind, product, tensors, choice, truth)}

    theirs = time_of(None)
    times = times_of(kind.choices(chip, product))
    for choice in sorted(times, key=times.__getitem__)[:3]:
        times |= times_of(v for v in kind.variants(chip, product, choice) if v not in times)
    fastest = sorted(times, key=times.__getitem__)
    best = next((choice for choice in fastest if stays_in_registers(chip, product, choice)), None)
    ours = times[best] if best is not None else float("inf")
    return Measured(product, kind.entry(best if ours < theirs else None), ours, theirs)


def _agrees(kind: Kind, product: Product, tensors: list[Tensor], choice: Any, truth: Tensor) -> bool:
    """Whether a choice runs and its result is right; says so where it is not."""
    try:
        y = kind.run(product, tensors, choice)
    except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError, RuntimeError) as error:
        logging.getLogger(__name__).info("%s: %s does not run: %s", product, choice, error)
        return False
    tolerance = 1e-3 if product.dtype == torch.float32 else 3e-2
    if torch.allclose(y.float(), truth.float(), rtol=tolerance, atol=tolerance):
        return True
    warnings.warn(f"{product}: {choice} gives wrong results and is left out", RuntimeWarning, stacklevel=2)
    return False


def stays_in_registers(chip: Chip, product: Product, choice: Any) -> bool:
    """Whether a choice, compiled for ``chip``, spills no registers; says so where it does. No table may name one."""
    from . import aot

    kind = KINDS[product.kind]
    spilled = aot.spills(chip, lambda: kind.run(product, kind.operands(product, torch.device("meta")), choice))
    if spilled > SPILLS.get(product.dtype, 0):
        logging.getLogger(__name__).info("%s: %s spills %d", product, choice, spilled)
        return False
    return True


def precompile(products: Iterable[Product], chip: Chip, processes: int) -> None:
    """Fill Triton's disk cache with what :func:`measure` will run first, side by side on all cores."""
    # sizes are not compiled in, only which steps divide them: one product of such a class stands for all
    jobs = {
        (p.kind, p.dtype, p.n % LONGEST_STEP, p.k % LONGEST_STEP, choice): (chip, p, choice)
        for p in products
        for choice in KINDS[p.kind].choices(chip, p)
    }
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, *zip(*jobs.values(), strict=True), chunksize=4))


def _compile(chip: Chip, product: Product, choice: Any) -> None:
    from .aot import compiling_for

    kind = KINDS[product.kind]
    with compiling_for(chip):
        try:
            kind.run(product, kind.operands(product, torch.device("meta")), choice)
        except Exception as error:  # measured again, and reported, where it matters
            logging.getLogger(__name__).info("%s: %s does not compile: %s", product, choice, error)


# --- tables -----------------------------------------------------------------------------------------------------------


def tune(
    products: Iterable[Product],
    device: torch.device,
    folder: Path,
    *,
    again: bool = False,
    timer: Timer = graph_microseconds,
    processes: int = 0,
) -> Iterator[Measured]:
    """Measure products on ``device`` one by one, adding each to the table in ``folder``; yields what was measured.

    Args:
        again: measure those too that the table has already.
        processes: that compile ahead, side by side; 0 compiles one by one as it goes.
    """
    chip = chip_of(device)
    path = tuning.table_path(chip.name, folder)
    present = () if again else [_key_of(entry) for entry in _read(path)]
    order = list(KINDS)
    wanted = [p for p in _with_rivals(products) if _key(p) not in present]
    wanted.sort(key=lambda p: (order.index(p.kind), str(p.dtype), p.n, p.k, p.m))
    if processes and wanted:
        precompile(wanted, chip, processes)
    for product in wanted:
        measured = measure(product, device, timer)
        _write(measured, chip, path)
        tuning.forget_tables()
        yield measured


def _with_rivals(products: Iterable[Product]) -> set[Product]:
    """The products of kinds that can be tuned, and those of the two launches that an FFN on chip is compared with."""
    known = {p for p in products if p.kind in KINDS and min(p.m, p.n, p.k) > 0}
    ffns = [p for p in known if p.kind == "on_chip"]
    known |= {replace(p, kind="linear_gelu", n=p.k, k=p.n) for p in ffns}
    known |= {replace(p, kind="two_source", k=p.n + p.k) for p in ffns}
    return known


def _key(product: Product) -> tuple[str, str, int, int, int]:
    return product.kind, str(product.dtype).removeprefix("torch."), product.n, product.k, product.m


def _key_of(entry: Entry) -> tuple[str, str, int, int, int]:
    return entry["kind"], entry["dtype"], entry["n"], entry["k"], entry["m"]


def choices_of(path: Path) -> Iterator[tuple[Product, Any]]:
    """What a table's entries choose for which products; those left to cuBLAS, PyTorch or two launches are left out."""
    forms = {"on_chip": OnChip, "attention": AttentionTile, "window_attention": AttentionTile}
    for entry in _read(path):
        kind, dtype, n, k, m = _key_of(entry)
        if entry["config"] and not entry["config"].get("vendor"):
            choice = forms.get(kind, Config)(**entry["config"])
            yield Product(kind, getattr(torch, dtype), m, n, k), choice


def _read(path: Path) -> list[Entry]:
    return json.loads(path.read_text())["entries"] if path.exists() else []


def _write(measured: Measured, chip: Chip, path: Path) -> None:
    """Add or replace one entry; the file is replaced whole, so that a reader never sees half of it."""
    key = _key(measured.product)
    entry = dict(zip(("kind", "dtype", "n", "k", "m"), key, strict=True))
    times = {"us": _rounded(measured.ours), "rival_us": _rounded(measured.theirs)}
    others = [other for other in _read(path) if _key_of(other) != key]
    entries = sorted([*others, {**entry, "config": measured.entry, **times}], key=_key_of)
    header = {
        "device": chip.name,
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f'{json.dumps(header)[:-1]}, "entries": [\n{lines}\n]}}\n')
    temporary.replace(path)


def _rounded(microseconds: float) -> float | None:
    return round(microseconds, 2) if math.isfinite(microseconds) else None
