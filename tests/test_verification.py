"""verify(): passes what is equal, fails what is not, and says where the error begins."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from model_helpers import images, tiny_swin, tiny_vit

import repavit_ops


@pytest.mark.parametrize(("build", "size"), [(tiny_vit, 32), (tiny_swin, 64)], ids=["vit", "swin"])
def test_equal_models_pass_with_a_row_per_block(build, size):
    model = build()
    report = repavit_ops.verify(model, repavit_ops.fuse(model), images(3, size))
    assert report
    assert report.output.top1 == 1.0
    assert report.output.cosine == pytest.approx(1.0)
    blocks = [name for name, m in model.named_modules() if hasattr(m, "attn") and hasattr(m, "mlp")]
    assert [block.name for block in report.blocks] == blocks
    assert "PASS in float32" in str(report)


def test_a_spoilt_weight_fails_and_the_first_bad_row_is_its_block():
    model = tiny_vit(depth=3)
    fused = repavit_ops.fuse(model)
    with torch.no_grad():
        fused.blocks[1].mlp.w_in[0, 0] += 1e-2
    report = repavit_ops.verify(model, fused, images())
    assert not report
    assert [block.passed for block in report.blocks] == [True, False, False]
    assert "FAIL" in str(report)


def test_not_a_number_fails():
    model = tiny_vit()
    fused = repavit_ops.fuse(model)
    with torch.no_grad():
        fused.head.bias[0] = float("nan")
    assert not repavit_ops.verify(model, fused, images())


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (images().numpy(), "ndarray at 0"),
        ([images(), 1.0], "float at 1"),
        ({"pixel_values": "a.jpg"}, "str at 'pixel_values'"),
        (tiny_vit(depth=1), "VisionTransformer at 0"),
    ],
    ids=["numpy", "list", "dictionary", "model"],
)
def test_inputs_that_are_no_tensors_are_named(inputs, words):
    model = tiny_vit(depth=1)
    with pytest.raises(TypeError, match=f"inputs: got {words}, wanted a tensor"):
        repavit_ops.verify(model, model, inputs)


def test_a_dropped_bias_fails_in_low_precision_too():
    model = tiny_vit()
    fused = repavit_ops.fuse(model, dtype=torch.bfloat16)
    assert repavit_ops.verify(model, fused, images())
    with torch.no_grad():
        fused.blocks[0].attn.b_proj.zero_()
    assert not repavit_ops.verify(model, fused, images())


class Summed(torch.nn.Module):
    """One number, a sum that bfloat16 holds exactly of whole numbers; ``off`` by so much."""

    def __init__(self, off=0.0, numbers=1):
        super().__init__()
        self.linear = torch.nn.Linear(4, numbers, bias=False)
        torch.nn.init.ones_(self.linear.weight)
        self.off = off

    def forward(self, x):
        return self.linear(x) + self.off


def test_of_few_numbers_eagers_error_is_looked_at_nearby_too():
    x, exact = torch.tensor([[3.0, 5.0, 2.0, 5.0]]), Summed().eval()
    rounding, fault = 0.0625, 0.5  # of a sum of 15 in bfloat16, and more than rounding can be
    assert repavit_ops.verify(exact, Summed(rounding).eval().bfloat16(), x)
    assert not repavit_ops.verify(exact, Summed(fault).eval().bfloat16(), x)
    assert not repavit_ops.verify(exact, Summed(float("nan")).eval().bfloat16(), x)
    assert not repavit_ops.verify(exact, Summed(1e-5).eval(), x)
    assert not repavit_ops.verify(exact, Summed(rounding).eval().bfloat16(), x, atol=0.01)


def test_many_numbers_hold_the_rule_as_it_is():
    x, many = torch.tensor([[3.0, 5.0, 2.0, 5.0]]), 32
    assert not repavit_ops.verify(Summed(numbers=many).eval(), Summed(0.0625, many).eval().bfloat16(), x)


def test_own_bound_replaces_the_rule():
    model = tiny_vit()
    fused = repavit_ops.fuse(model)
    assert not repavit_ops.verify(model, fused, images(), atol=0.0)
    assert repavit_ops.verify(model, fused, images(), atol=1e-3)


def test_models_are_left_as_they_were():
    model = tiny_vit()
    fused = repavit_ops.fuse(model)
    before = copy.deepcopy(model.state_dict())
    repavit_ops.verify(model, fused, images())
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in (*model.modules(), *fused.modules()))


def test_report_is_plain_data():
    model = tiny_vit()
    report = repavit_ops.verify(model, repavit_ops.fuse(model), (images(),))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["passed"] is True
    assert len(data["blocks"]) == 2


def test_training_mode_and_unlike_outputs_are_named():
    model = tiny_vit()
    with pytest.raises(RuntimeError, match=r"candidate: in training mode.*candidate\.eval\(\)"):
        repavit_ops.verify(model, tiny_vit().train(), images())
    with pytest.raises(ValueError, match=r"output: candidate gives shape \[2, 7\], reference \[2, 10\]"):
        repavit_ops.verify(model, tiny_vit(num_classes=7), images())


class Several(torch.nn.Module):
    """A model that returns a dictionary and takes its arguments by name."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.factor = factor

    def forward(self, pixels, scale=None):
        y = self.linear(pixels)
        return {
            "logits": y if scale is None else y * scale,
            "hidden": (pixels, self.factor * y),
            "count": torch.ones(1).long(),
        }


def test_every_tensor_of_an_output_is_compared_and_arguments_may_have_names():
    torch.manual_seed(0)
    right, wrong = Several().eval(), Several(1.5).eval()
    wrong.load_state_dict(right.state_dict())
    inputs = {"pixels": torch.randn(2, 4), "scale": torch.randn(4)}
    report = repavit_ops.verify(right, right, inputs)
    assert report
    assert [row.name for row in report.outputs] == ["output.logits", "output.hidden.0", "output.hidden.1"]
    report = repavit_ops.verify(right, wrong, inputs)
    assert not report
    assert report.output.name == "output.hidden.1"
    assert len(report.to_dict()["outputs"]) == 3


def test_a_model_that_returns_no_tensor_is_refused():
    class Nothing(torch.nn.Module):
        def forward(self, x):
            return None

    with pytest.raises(ValueError, match="returned NoneType without any float tensor"):
        repavit_ops.verify(Nothing().eval(), Nothing().eval(), torch.ones(1))
