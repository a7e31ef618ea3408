"""The table of ``repavit-ops tune --cpu``: its file, which entry counts, and that nothing is read or timed unasked."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings

import pytest
import torch
from cpu_tuning_helpers import (
    BF16,
    MODULES,
    NO_KERNELS,
    USAGE,
    empty_table,
    quick_command,
    remember,
)
from model_helpers import images, tiny_vit

import repavit_ops
from repavit_ops import cpu_tuning, info
from repavit_ops.benchmarking import cpu_tuner
from repavit_ops.cpu_tuning import Measured, Operation
from repavit_ops.nn import GatedFFN, PartialGELUFFN, RepAttention, WindowRepAttention

pytestmark = pytest.mark.skipif(NO_KERNELS is not None, reason=f"no C++ kernels: {NO_KERNELS}")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    yield from empty_table(tmp_path, monkeypatch)


@pytest.fixture
def call(monkeypatch):
    return quick_command(monkeypatch)


def named(entry, table):
    """An entry of a table's file."""
    return json.loads(table.read_text())["entries"][entry]


def test_a_table_gives_back_what_was_added_and_replaces_what_is_measured_again(folder):
    ffn, attention = (make().operation() for make, _ in (MODULES["partial_gelu_ffn"], MODULES["rep_attention"]))
    first = [Measured.of(ffn, (5, 16), 1, 2.0, 1.0), Measured.of(ffn, (5, 16), 8, 1.0, math.pi)]
    other = Measured.of(attention, (5, 16), 1, math.inf, 1.0)
    again = Measured.of(ffn, (5, 16), 1, 1.0, 2.0)
    for measured in (*first, other, again):
        cpu_tuning.add(measured, cpu_tuning.path())
    assert set(cpu_tuning.read(cpu_tuning.path())) == {again, first[1], other}
    assert first[1].pytorch_us == 3.14
    assert [file.name for file in folder.iterdir()] == [cpu_tuning.path().name]  # and nothing half written
    assert named(0, cpu_tuning.path())["operator"] == "partial_gelu_ffn"


def test_the_table_is_where_the_variable_says_or_in_the_users_cache(folder, monkeypatch):
    assert cpu_tuning.path().parent == folder
    monkeypatch.delenv("REPAVIT_TUNED")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    assert cpu_tuning.path().parent == folder / "cache" / "repavit_ops"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(folder / "home"))
    assert cpu_tuning.path().parent == folder / "home" / ".cache" / "repavit_ops"


@pytest.mark.parametrize(
    ("us", "pytorch_us", "choice"),
    [(1.03, 1.0, "pytorch"), (1.0299, 1.0, "cpp"), (1.0, 1.0, "cpp"), (math.inf, 1.0, "pytorch")],
)
def test_pytorch_is_chosen_where_it_is_faster_by_three_percent(us, pytorch_us, choice):
    assert Measured.of(PartialGELUFFN(16, 8).operation(), (5, 16), 1, us, pytorch_us).choice == choice


@pytest.mark.parametrize("name", ["cpu", "level", "repavit_ops", "torch"])
def test_a_table_of_something_else_is_not_followed_and_info_says_so(name, monkeypatch):
    module, x = PartialGELUFFN(16, 8), torch.zeros(1, 5, 16)
    remember(module.operation(), (5, 16), 1, "pytorch")
    file = cpu_tuning.path()
    table = json.loads(file.read_text())
    value, table[name] = table[name], "another"
    file.write_text(json.dumps(table))
    cpu_tuning.forget()
    module.repack()
    assert module.backend_for(x) == "auto"
    said = dict(info.rows(info.collect()))["cpu table"]
    assert said == f"not used: {file} was measured with {name} another, not {value}; {cpu_tuning.COMMAND} measures anew"
    remember(module.operation(), (7, 16), 1, "pytorch")  # begins anew
    assert [measured.size for measured in cpu_tuning.read(file)] == [(7, 16)]


def test_info_says_how_the_table_stands(monkeypatch, folder):
    def said():
        return dict(info.rows(info.collect()))["cpu table"]

    file = cpu_tuning.path()
    assert said() == f"none ({file}): {cpu_tuning.COMMAND} measures"
    (folder / "cpu_another_avx2.json").write_text("")
    assert said() == f"none ({file}); 1 of other CPUs or levels: {cpu_tuning.COMMAND} measures"
    remember(PartialGELUFFN(16, 8).operation(), (5, 16), 1, "pytorch")
    remember(PartialGELUFFN(16, 8).operation(), (5, 16), 8, "cpp")
    threads = torch.get_num_threads()
    assert said() == f"{file}: 2 measured on {threads} threads; PyTorch's own form for 1"
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert f", none of which has the {threads + 1} of now; " in said()


MALFORMED = {
    "empty": b"",
    "bytes": b"\xff\xfe\x00",
    "list": b"[]",
    "no_header": b'{"entries": []}',
    "deep": b"[" * 100_000,
    "entries": b"null",
    "entry": b"[3]",
    "batch": b'[{"batch": 0}]',
    "choice": b'[{"choice": "fastest"}]',
    "size": b'[{"size": "wide"}]',
    "us": b'[{"us": "quick"}]',
    "huge": b'[{"batch": 1e999}]',
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_file_that_is_no_table_is_a_warning_with_its_name_and_the_fix(what, call):
    module, file = PartialGELUFFN(16, 8), cpu_tuning.path()
    remember(module.operation(), (5, 16), 1, "pytorch")
    content = MALFORMED[what]
    if what in ("entries", "entry", "batch", "choice", "size", "us", "huge"):
        table, wrong = json.loads(file.read_text()), json.loads(content)
        of_entry = isinstance(wrong, list) and isinstance(wrong[0], dict)
        table["entries"] = [{**table["entries"][0], **wrong[0]}] if of_entry else wrong
        content = json.dumps(table).encode()
    file.write_bytes(content)
    cpu_tuning.forget()
    with pytest.warns(RuntimeWarning, match="the CPU's table is not used: .*is no table of this library") as caught:
        module.repack()
    assert f"{file} is no table" in str(caught[0].message)
    assert "delete it" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module(torch.zeros(1, 5, 16)).shape == (1, 5, 16)  # and is told once
    assert cpu_tuning.state().startswith(f"not used: {file} is no table")
    status, _, err = call("tune", "--cpu", "vanilla_deit_tiny", "--batch", "1", "--dtype", "float32")
    assert status == USAGE
    assert f"{file} is no table" in err
    assert file.read_bytes() == content


def test_a_folder_that_cannot_be_read_is_a_warning_too():
    cpu_tuning.path().mkdir()
    with pytest.warns(RuntimeWarning, match=r"is no table of this library \(IsADirectoryError"):
        PartialGELUFFN(16, 8).repack()


@pytest.mark.parametrize(
    "other",
    [
        lambda: PartialGELUFFN(16, 9),
        lambda: PartialGELUFFN(16, 8, bias=False),
        lambda: PartialGELUFFN(16, 8, merged=False),
        lambda: PartialGELUFFN(16, 8, norm_eps=1e-6),
        lambda: PartialGELUFFN(16, 8, residual=True),
        lambda: PartialGELUFFN(16, 8, approximate="tanh"),
        lambda: PartialGELUFFN(16, 8, dtype=BF16),
        lambda: GatedFFN(16, 8, activation="silu"),
    ],
)
def test_other_operations_are_not_in_the_table(other):
    remember(PartialGELUFFN(16, 8).operation(), (5, 16), 1, "pytorch")
    assert cpu_tuning.choose(PartialGELUFFN(16, 8).operation()) is not None
    assert cpu_tuning.choose(other().operation()) is None


def test_attention_and_windows_of_one_width_are_different_operations():
    plain, window = RepAttention(16, 2), WindowRepAttention(16, 2, window=2)
    assert plain.operation().operator == "rep_attention"
    assert window.operation().operator == "window_rep_attention"
    shifted = WindowRepAttention(16, 2, window=2, shift=1)
    assert window.operation() != shifted.operation()


def test_another_number_of_threads_has_its_own_entries(monkeypatch):
    remember(PartialGELUFFN(16, 8).operation(), (5, 16), 1, "pytorch")
    assert cpu_tuning.choose(PartialGELUFFN(16, 8).operation()) is not None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert cpu_tuning.choose(PartialGELUFFN(16, 8).operation()) is None


def test_a_batch_goes_where_its_nearest_measured_one_goes():
    operation = PartialGELUFFN(16, 8).operation()
    for batch, choice in ((1, "cpp"), (8, "pytorch"), (32, "pytorch"), (128, "cpp")):
        remember(operation, (5, 16), batch, choice)
    module = PartialGELUFFN(16, 8)
    module.repack()
    batches = (1, 2, 3, 8, 32, 63, 64, 65, 1000)  # edges: √(1·8) = 2.8, √(32·128) = 64
    chosen = [module.backend_for(torch.zeros(batch, 5, 16)) for batch in batches]
    assert chosen == ["auto", "auto", *["pytorch"] * 5, "auto", "auto"]
    assert [cpu_tuning.batch_class(batch) for batch in batches] == [0, 0, 1, 1, 1, 1, 1, 2, 2]
    assert module.backend_for(torch.zeros(8, 6, 16)) == "auto"
    assert str(module.choice) == "PyTorch's own form for 5x16 at batch 3 to 64"


# --- nothing unasked --------------------------------------------------------------------------------------------------


def test_nothing_is_read_at_import_and_the_table_once_when_a_model_is_fused(folder):
    remember(PartialGELUFFN(16, 8).operation(), (5, 16), 1, "pytorch")
    program = f"""
        import sys
        opened = []
        watch = lambda event, args: opened.append(str(args[0])) if event == "open" else None
        sys.addaudithook(watch)
        import torch
        torch.nn.Linear(2, 2)
        opened.clear()
        import repavit_ops, repavit_ops.cpu_tuning
        table = {str(cpu_tuning.path())!r}
        asked = [name for name in opened if name == table or name.startswith("/proc/cpu")]
        assert not asked, asked
        repavit_ops.fuse(repavit_ops.create_model("repa_deit_tiny", img_size=32).eval())
        assert opened.count(table) == 1, opened.count(table)
    """
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(line[8:] for line in program.splitlines())],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_nothing_is_measured_or_written_unasked(folder, monkeypatch):
    monkeypatch.setattr(cpu_tuner, "interleave", lambda *args: pytest.fail("measured"))
    fused = repavit_ops.fuse(tiny_vit())
    with torch.no_grad():
        fused(images(1))
    info.collect()
    assert list(folder.iterdir()) == []


def test_a_call_asks_no_table(monkeypatch):
    model, x = repavit_ops.fuse(tiny_vit()), images(1)
    with torch.no_grad():
        model(x)
        model.in_one_call = False
        model(x)
        monkeypatch.setattr(cpu_tuning, "choose", lambda operation: pytest.fail("asked"))
        monkeypatch.setattr(Operation, "of", lambda *args: pytest.fail("asked"))
        model(x)
        model.in_one_call = True
        model(x)
