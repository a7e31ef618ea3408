"""Outputs follow the weights: whoever writes them, in every form of a fused model.

A table: writers (weight_writers.py) x forms x families. What is right is plain PyTorch on the weights as they are now.
"""

from __future__ import annotations

import pytest
import torch
from model_helpers import images, relative, tiny_swin, tiny_vit
from torch import nn
from weight_writers import WRITERS

import repavit_ops
from repavit_ops import backends
from repavit_ops.nn import PartialGELUFFN, RepAttention

pytestmark = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    for p in model.parameters():
        nn.init.trunc_normal_(p, std=0.1)
    return model.eval()


class Block(nn.Module):
    """Attention and FFN, each called by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = RepAttention(48, 3, norm_eps=1e-6, residual=True)
        self.mlp = PartialGELUFFN(48, 40, norm_eps=1e-6)

    def forward(self, x):
        return self.mlp(self.attn(x))


FAMILIES = {  # name → (builds the fused model, an input)
    "modules": (lambda: Block().requires_grad_(False).eval(), lambda: torch.randn(2, 9, 48)),
    "vit": (lambda: repavit_ops.fuse(tiny_vit()), images),
    "swin": (lambda: repavit_ops.fuse(tiny_swin(img_size=32, depths=[2, 1])), images),
    "timm": (lambda: repavit_ops.fuse(timm_vit()), images),
}


def part_by_part(model, x):
    """The model with hooks on its parts, which makes it call them one by one."""
    for part in model.modules():
        part.register_forward_hook(lambda *_: None)
    return model


def compiled(backend):
    return lambda model, x: torch.compile(model, backend=backend)


def exported(model, x):
    program = torch.export.export(model, (x,)).module()
    return program


FORMS = {
    "as it is": lambda model, x: model,
    "part by part": part_by_part,
    "aot_eager": compiled("aot_eager"),
    "inductor": compiled("inductor"),
    "exported": exported,
}
CHECKED = [
    *((family, form) for family in FAMILIES for form in ("as it is", "part by part", "aot_eager", "exported")),
    ("vit", "inductor"),
]
# These take seconds for many parameters, and write all alike.
OPTIMIZERS = {name for name in WRITERS if name.startswith(("SGD", "Ada"))}
# A program has its weights as attributes of its own; it is no module that could be cast or given other parameters.
NOT_IN_PROGRAMS = {"to float64 and back", "assigned", "load_state_dict, swap"}


def weights_of(form):
    return getattr(form, "_orig_mod", form)


def wrong(write, form, plain, x):
    """What is wrong behind a writer; nothing if the outputs are those of plain PyTorch on the weights as they are."""
    with torch.no_grad():
        before = form(x)
    write(weights_of(form))
    with torch.no_grad():
        first, second = form(x), form(x)
        plain.load_state_dict(weights_of(form).state_dict())
        expected = plain(x)
    if relative(before, expected) < 1e-3:
        return "it wrote nothing"
    errors = [relative(y, expected) for y in (first, second)]
    return f"off by {errors[0]:.2g}, then {errors[1]:.2g}" if not max(errors) < 1e-4 else ""


@pytest.mark.parametrize(("family", "form"), CHECKED, ids=lambda value: value.replace(" ", "_"))
def test_outputs_follow_the_weights(family, form, request):
    if family == "timm":
        request.getfixturevalue("timm")
    torch._dynamo.reset()
    torch.manual_seed(0)
    build, sample = FAMILIES[family]
    x = sample()
    start = build()
    plain = repavit_ops.fuse(start, backend="reference")
    with torch.no_grad():
        model = FORMS[form](start, x)
        model(x)
    state = {name: value.clone() for name, value in weights_of(model).state_dict().items()}
    faults = {}
    left_out = NOT_IN_PROGRAMS if form == "exported" else set()
    left_out |= OPTIMIZERS if family in ("swin", "timm") else set()
    left_out |= {"AdamW compiled"} if (family, form) != ("modules", "as it is") else set()
    for name, write in WRITERS.items():
        if name in left_out:
            continue
        if fault := wrong(write, model, plain, x):
            faults[name] = fault
        weights_of(model).load_state_dict(state)
    assert not faults
