"""The tuner without a GPU: what it measures, what it writes, and that launchers then do as the table says."""

from __future__ import annotations

import json

import pytest
import torch

from repavit_ops.kernels import linear as linear_module
from repavit_ops.kernels import partial_gelu_ffn as ffn
from repavit_ops.kernels import tuner, tuning
from repavit_ops.kernels.attention_tiles import VENDOR, Attention, AttentionTile, choose
from repavit_ops.kernels.chips import INTERPRETER, KNOWN
from repavit_ops.kernels.tuning import Config, OnChip, Product

CPU = torch.device("cpu")
FEW = (Config(16, 32, 16, 1, 1), Config(32, 32, 16, 1, 1))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of tables, a handful of candidates, and no trace left behind."""
    monkeypatch.setenv("REPAVIT_TUNED", str(tmp_path))
    for name in ("linear", "linear_gelu", "two_source"):
        few = lambda chip, product: list(FEW)  # noqa: E731
        kind = tuner.KINDS[name]
        monkeypatch.setitem(tuner.KINDS, name, tuner.replace(kind, choices=few))
    on_chip = tuner.replace(tuner.KINDS["on_chip"], choices=lambda chip, product: [OnChip(16, 16, 16, 1, 1)])
    monkeypatch.setitem(tuner.KINDS, "on_chip", on_chip)
    tuning.forget_tables()
    yield tmp_path
    tuning.forget_tables()


def timer_that_prefers(monkeypatch, favourite):
    """Calls that launch with ``favourite`` take 1 µs, all others 2 µs."""
    running = []
    for name, kind in list(tuner.KINDS.items()):

        def run(product, tensors, choice, kind=kind):
            running.append(choice)
            return kind.run(product, tensors, choice)

        monkeypatch.setitem(tuner.KINDS, name, tuner.replace(kind, run=run))

    def timer(call):
        call()
        return 1.0 if running[-1] == favourite else 2.0

    return timer


def table(folder):
    return json.loads(tuning.table_path(INTERPRETER.name, folder).read_text())


def test_the_fastest_is_written_and_then_taken(folder, monkeypatch):
    favourite = tuner.replace(FEW[1], split=False)  # a variant of the second candidate
    timer = timer_that_prefers(monkeypatch, favourite)
    product = Product("linear", torch.float32, 40, 32, 16)
    assert tuning.choose("linear", INTERPRETER, torch.float32, 40, 32, 16) != favourite
    (measured,) = tuner.tune([product], CPU, folder, timer=timer)
    assert (measured.ours, measured.theirs) == (1.0, 2.0)
    assert tuning.choose("linear", INTERPRETER, torch.float32, 40, 32, 16) == favourite
    assert tuning.choose("linear", INTERPRETER, torch.float32, 4000, 32, 16) == favourite  # the nearest m
    assert tuning.choose("linear", INTERPRETER, torch.float16, 40, 32, 16) != favourite
    assert tuning.choose("linear", INTERPRETER, torch.float32, 40, 32, 16, aligned=False) != favourite
    assert table(folder)["device"] == INTERPRETER.name


def test_cublas_is_taken_where_it_is_faster(folder, monkeypatch):
    timer = timer_that_prefers(monkeypatch, None)
    products = [Product("linear_gelu", torch.float32, 8, 16, 16), Product("two_source", torch.float32, 8, 16, 32)]
    assert all(m.entry == {"vendor": True} for m in tuner.tune(products, CPU, folder, timer=timer))
    for kernel in (linear_module, ffn):
        name = "linear_kernel" if kernel is linear_module else "two_source_kernel"
        monkeypatch.setattr(kernel, name, None)  # any launch would fail
    x, w = torch.randn(8, 16), torch.randn(16, 16)
    h = linear_module.linear(x, w, activation="gelu")
    torch.testing.assert_close(h, torch.nn.functional.gelu(x @ w.t()))
    y = ffn.two_source(x, w, h, w, None, x)
    torch.testing.assert_close(y, x @ w.t() + h @ w.t() + x)


def test_what_spills_is_no_entry(folder, monkeypatch):
    """The fastest tile that keeps to its registers is written, and cuBLAS where none does."""
    timer = timer_that_prefers(monkeypatch, FEW[0])
    product = Product("linear", torch.float32, 40, 32, 16)
    spilling = [FEW[0]]
    monkeypatch.setattr(tuner, "stays_in_registers", lambda chip, product, choice: choice not in spilling)
    (measured,) = tuner.tune([product], CPU, folder, timer=timer)
    assert measured.ours == 2.0  # no faster than cuBLAS
    assert measured.entry == {"vendor": True}
    timer = timer_that_prefers(monkeypatch, FEW[1])
    (measured,) = tuner.tune([product], CPU, folder, timer=timer, again=True)
    assert [choice for _, choice in tuner.choices_of(tuning.table_path(INTERPRETER.name, folder))] == [FEW[1]]


def test_nearest_rows_by_ratio(folder, monkeypatch):
    timer = timer_that_prefers(monkeypatch, FEW[0])
    (few,) = tuner.tune([Product("linear", torch.float32, 4, 32, 16)], CPU, folder, timer=timer)
    timer = timer_that_prefers(monkeypatch, FEW[1])
    (many,) = tuner.tune([Product("linear", torch.float32, 64, 32, 16)], CPU, folder, timer=timer)
    assert few.entry != many.entry
    chosen = [tuning.choose("linear", INTERPRETER, torch.float32, m, 32, 16) for m in (1, 15, 17, 10_000)]
    assert chosen == [FEW[0], FEW[0], FEW[1], FEW[1]]


def test_the_ffn_on_chip_stands_against_tuned_launches(folder, monkeypatch):
    product = Product("on_chip", torch.float16, 20, 16, 16)
    timer = timer_that_prefers(monkeypatch, OnChip(16, 16, 16, 1, 1))
    kinds = [m.product.kind for m in tuner.tune([product], CPU, folder, timer=timer)]
    assert kinds == ["linear_gelu", "two_source", "on_chip"]
    assert tuning.choose_on_chip(INTERPRETER, torch.float16, 20, 16, 16) == OnChip(16, 16, 16, 1, 1)
    timer = timer_that_prefers(monkeypatch, None)
    list(tuner.tune([product], CPU, folder, timer=timer, again=True))
    assert tuning.choose_on_chip(INTERPRETER, torch.float16, 20, 16, 16) is None


def test_what_the_table_has_is_not_measured_again(folder, monkeypatch):
    timer = timer_that_prefers(monkeypatch, FEW[0])
    product = Product("linear", torch.float32, 16, 32, 16)
    assert len(list(tuner.tune([product], CPU, folder, timer=timer))) == 1
    assert list(tuner.tune([product], CPU, folder, timer=timer)) == []
    assert len(list(tuner.tune([product], CPU, folder, timer=timer, again=True))) == 1
    assert len(table(folder)["entries"]) == 1


def test_wrong_results_are_left_out(folder, monkeypatch):
    kind = tuner.KINDS["linear"]

    def run(product, tensors, choice):
        return kind.run(product, tensors, choice) + (choice == FEW[0])

    monkeypatch.setitem(tuner.KINDS, "linear", tuner.replace(kind, run=run, variants=lambda *_: []))
    timer = timer_that_prefers(monkeypatch, FEW[0])  # fast, but wrong
    with pytest.warns(RuntimeWarning, match="wrong results"):
        (measured,) = tuner.tune([Product("linear", torch.float32, 16, 32, 16)], CPU, folder, timer=timer)
    assert measured.entry == {"vendor": True}


def test_recording_collects_what_an_operator_looks_up():
    x, w = torch.randn(5, 16, dtype=torch.float16), torch.randn(16, 16, dtype=torch.float16)
    with tuning.recording() as products:
        ffn.partial_gelu_ffn(x, w, None, w, w, None)
    kinds = {(p.kind, p.m, p.n, p.k) for p in products}
    assert kinds == {("on_chip", 5, 16, 16), ("linear_gelu", 5, 16, 16), ("two_source", 5, 16, 32)}
    with tuning.recording() as nothing:
        pass
    assert nothing == set()


def test_every_candidate_fits_the_chip_it_is_for():
    for chip in KNOWN.values():
        for dtype in (torch.bfloat16, torch.float32):
            for m in (1, 197, 25216):
                choices = tuner.KINDS["linear"].choices(chip, Product("linear", dtype, m, 768, 768))
                assert choices
                assert all(c.shared_memory(dtype.itemsize) <= chip.shared_memory for c in choices)


@pytest.mark.parametrize("kind", ["attention", "window_attention"])
@pytest.mark.parametrize("favourite", [AttentionTile(32, warps=1), None], ids=["ours", "pytorch"])
def test_attention_is_tuned_against_pytorchs_own(folder, monkeypatch, favourite, kind):
    tiles = [AttentionTile(16, warps=1), AttentionTile(32, warps=1)]
    monkeypatch.setitem(tuner.KINDS, kind, tuner.replace(tuner.KINDS[kind], choices=lambda chip, product: tiles))
    product, windows = Product(kind, torch.float16, 4, 25, 16), kind == "window_attention"
    timer = timer_that_prefers(monkeypatch, favourite)
    (measured,) = tuner.tune([product], CPU, folder, timer=timer)
    assert (measured.ours < measured.theirs) == (favourite is not None)
    chosen = choose(INTERPRETER, torch.float16, Attention(2, 25, 2, 16, 16, biased=windows, windows=windows))
    assert chosen == (favourite or VENDOR)
