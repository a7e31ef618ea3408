#!/usr/bin/env bash
# torch.compile(backend="openvino") stops at every convolution wider than a pixel, and so at every ViT's patches.
#
# Guess: a ViT compiles as with any backend, in bfloat16 on processors that have it, and answers to 1e-6 in float32.
# Seen (openvino 2026.4.1, torch 2.13.0, CPU): linear layers, norms, attention and a convolution of 1 x 1 compile and are
# right. A kernel of 2 x 2 or more, in one dimension or two, raises while dynamo builds its guards, before OpenVINO
# computes anything, with dynamic=False too; pooling raises as well. convert_model and compile_model take all of them.
#
#   Linear                                     right
#   LayerNorm                                  right
#   MultiheadAttention                         right
#   Conv2d, kernel 1                           right
#   Conv2d, kernel 16, stride 16               AssertionError: sources must not be empty for symbol
#   Conv1d, kernel 3                           AssertionError: sources must not be empty for symbol
#   MaxPool2d, kernel 2                        IndexError: list index out of range
#   Conv2d, kernel 16, by convert_model        right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/probe.py" <<'PY'
import openvino
import openvino.torch
import torch
from torch import nn


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def by_compile(model, x):
    torch._dynamo.reset()
    return torch.compile(model, backend="openvino")(x)


def by_convert(model, x):
    return torch.from_numpy(openvino.compile_model(openvino.convert_model(model, example_input=x), "CPU")([x.numpy()])[0])


REFUSED = "AssertionError: sources must not be empty for symbol"
CASES = (
    ("Linear", nn.Linear(8, 8), (2, 5, 8), by_compile, "right"),
    ("LayerNorm", nn.LayerNorm(8), (2, 5, 8), by_compile, "right"),
    ("MultiheadAttention", SelfAttention(), (2, 5, 8), by_compile, "right"),
    ("Conv2d, kernel 1", nn.Conv2d(3, 8, 1), (2, 3, 32, 32), by_compile, "right"),
    ("Conv2d, kernel 16, stride 16", nn.Conv2d(3, 8, 16, 16), (2, 3, 32, 32), by_compile, REFUSED),
    ("Conv1d, kernel 3", nn.Conv1d(3, 8, 3), (2, 3, 32), by_compile, REFUSED),
    ("MaxPool2d, kernel 2", nn.MaxPool2d(2), (2, 3, 32, 32), by_compile, "IndexError: list index out of range"),
    ("Conv2d, kernel 16, by convert_model", nn.Conv2d(3, 8, 16, 16), (2, 3, 32, 32), by_convert, "right"),
)
torch.manual_seed(0)
for name, model, shape, way, expected in CASES:
    x = torch.randn(shape)
    with torch.no_grad():
        try:
            torch.testing.assert_close(way(model.eval(), x), model(x), rtol=1e-2, atol=1e-2)  # bfloat16 where it is
            outcome = "right"
        except Exception as error:
            outcome = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}".split(" symbol")[0]
            outcome += " symbol" if expected == REFUSED else ""
    print(f"{name:<42} {outcome}")
    assert outcome == expected, expected
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.3.4 openvino==2026.4.1
"$folder/env/bin/python" "$folder/probe.py" 2>/dev/null
