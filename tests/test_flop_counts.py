"""FlopCounterMode on the operators and on fused models: what the formula in plain PyTorch counts on the meta device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_helpers import tiny_swin, tiny_vit
from test_gated_ffn import operands as gated_operands
from test_partial_gelu_ffn import operands as ffn_operands
from test_patch_projection import operands as patch_operands
from test_rep_attention import operands as attention_operands
from test_window_rep_attention import operands as window_operands
from torch.utils.flop_counter import FlopCounterMode

import repavit_ops
from repavit_ops import backends, flop_formulas, library, ops, reference
from repavit_ops.stack_plan import Step

OP = torch.ops.repavit_ops
needs_cpp = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)


def counted(function, *args, **kwargs) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args, **kwargs)
    return counter.get_total_flops()


def on_meta(tensors):
    return [None if t is None else t.to("meta") for t in tensors]


def attention_case(bias=False, **sizes):
    tensors, static = attention_operands(**{"batch": 2, "tokens": 5, "c": 8, "heads": 2, "d_qk": 3, "d_v": 4, **sizes})
    return (*tensors, torch.zeros(5, 5) if bias else None), static


CASES = {
    "ffn": ("partial_gelu_ffn", (ffn_operands(3, 8, 5), {})),
    "ffn_batches": ("partial_gelu_ffn", ([ffn_operands(6, 8, 5)[0].view(2, 1, 3, 8), *ffn_operands(3, 8, 5)[1:]], {})),
    "ffn_not_merged": ("partial_gelu_ffn", ([*ffn_operands(3, 8, 5)[:4], None, None], {"norm_eps": 1e-6})),
    "ffn_m_zero": ("partial_gelu_ffn", (ffn_operands(3, 8, 0), {})),
    "gated_ffn": ("gated_ffn", (gated_operands(3, 8, 5), {"activation": "silu"})),
    "gated_ffn_not_merged": ("gated_ffn", ([*gated_operands(3, 8, 5)[:6], None, None], {"activation": "gelu"})),
    "attention": ("rep_attention", attention_case()),
    "attention_bias": ("rep_attention", attention_case(bias=True)),
    "attention_c_out": ("rep_attention", attention_case(c_out=6)),
    "windows": ("window_rep_attention", window_operands(2, 8, 4, 8, 2, 4, [4, 4], [0, 0])),
    "windows_shifted_padded": ("window_rep_attention", window_operands(2, 5, 7, 8, 2, 4, [4, 3], [2, 1])),
    "patches": (
        "patch_projection",
        (patch_operands(2, 3, 9, 12, (4, 4), 5, False), {"patch": [4, 4], "channels_last": False}),
    ),
    "merging": (
        "patch_projection",
        (patch_operands(2, 3, 9, 12, (2, 2), 5, True), {"patch": [2, 2], "channels_last": True, "norm_eps": 1e-5}),
    ),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CASES)
def test_an_operator_counts_what_its_formula_counts(name, device):
    operator, (tensors, static) = CASES[name]
    expected = counted(getattr(reference, operator), *on_meta(tensors), **static)
    assert expected > 0
    given = [None if t is None else t.float().to(device) for t in tensors]
    assert counted(getattr(OP, operator), *given, **static) == expected


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_whole_model_in_one_call(device):
    g = torch.Generator().manual_seed(0)
    patches = {"patch": (2, 2), "norm_eps": None}
    x = torch.randn(2, 3, 9, 8, generator=g).to(device)

    def draw(*sizes):
        return torch.randn(*sizes, generator=g).to(device)

    for prefix, as_map in ((None, True), (None, False), (draw(2, 8), False)):
        steps = [Step("token_embedding", (draw(8, 12), None, prefix, None, None, None), {**patches, "as_map": as_map})]
        if as_map:
            static = {"num_heads": 2, "scale": 1.0, "window": (3, 2), "shift": (1, 0), "norm_eps": None}
            static |= {"residual": True, "roll_first": False}
            weights = (draw(24, 8), None, draw(8, 8), None, draw(2, 6, 6), None)
            merging = {**patches, "channels_last": True}
            steps.append(Step("window_rep_attention", weights, static))
            steps.append(Step("patch_projection", (draw(8, 32), None), merging))
        else:
            static = {"num_heads": 2, "scale": 1.0, "d_qk": 4, "norm_eps": 1e-6, "residual": True}
            steps.append(Step("rep_attention", (draw(24, 8), None, draw(8, 8), None), static))
        ffn = {"norm_eps": None, "residual": False, "approximate": "none"}
        steps.append(Step("partial_gelu_ffn", (draw(5, 8), None, draw(8, 5), draw(8, 8), None), ffn))
        head = {"first": 0, "count": 0, "norm_eps": None}
        for weight in (draw(7, 8), None):
            whole = [*steps, Step("pooled_head", (weight, None, None, None), head)]
            plain = [Step(s.operator, tuple(on_meta(s.tensors)), s.static) for s in whole]
            expected = counted(ops.fused_blocks, x.to("meta"), plain, backend="reference")
            assert counted(ops.fused_blocks, x, whole) == expected


@needs_cpp
def test_the_attention_without_weights():
    qkv, bias = torch.randn(2, 6, 2 * (3 + 3 + 4)), torch.zeros(2, 6, 6)
    static = {"num_heads": 2, "d_qk": 3, "scale": 1.0}
    expected = counted(reference.attention_core, qkv.to("meta"), None, 2, 3, 1.0)
    assert counted(OP.attention_core, qkv, None, **static) == expected
    maps = qkv.view(2, 2, 3, -1)
    args = ((2, 3), (1, 0), False)
    expected = counted(reference.window_attention_core, maps.to("meta"), bias.to("meta"), None, 2, 3, 1.0, *args)
    windows = {"window": args[0], "shift": args[1], "roll_first": args[2]}
    assert counted(OP.window_attention_core, maps, bias, None, **static, **windows) == expected


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
def test_a_fused_model_counts_what_the_merged_one_counts(build, device):
    model = build()
    size = (2, 3, 32, 32)
    merged = repavit_ops.reparameterize(model)
    fused = repavit_ops.fuse(merged)
    expected = counted(merged.to("meta"), torch.empty(size, device="meta"))
    assert counted(fused.to(device), torch.zeros(size, device=device)) == expected


def test_every_operator_has_a_formula():
    names = {operator.name for operator in library.OPERATORS} | {"fused_blocks"}
    assert names <= set(flop_formulas.FORMULAS)


ORDERS = {
    "before": "import torch.utils.flop_counter, repavit_ops.ops",
    "behind": "import repavit_ops.ops, torch.utils.flop_counter",
    "from": "import repavit_ops.ops; from torch.utils.flop_counter import FlopCounterMode",
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_in_whatever_order_they_are_imported(order):
    code = f"""
import torch
{order}
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    torch.ops.repavit_ops.partial_gelu_ffn(torch.ones(2, 4), torch.ones(3, 4), None, torch.ones(4, 3), None, None)
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(2 * 2 * 3 * 4 * 2)], done.stderr


def test_the_operators_do_not_import_the_counter():
    """It brings triton, which costs more than all of this package. (The package itself is another test's.)"""
    code = """
import sys, types, torch
package = types.ModuleType("repavit_ops")
package.__path__ = [sys.argv[1]]
sys.modules["repavit_ops"] = package
before = set(sys.modules)
import repavit_ops.library
print(*(set(sys.modules) - before))
"""
    folder = str(Path(repavit_ops.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=120, check=True)
    imported = set(done.stdout.split())
    assert "repavit_ops.flop_formulas" in imported
    assert not {"torch.utils.flop_counter", "torch._dynamo", "triton"} & imported
