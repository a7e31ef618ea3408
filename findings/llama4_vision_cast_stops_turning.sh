#!/usr/bin/env bash
# Llama 4's vision tower loses its rotary embedding by .to(dtype), and keeps it by .float(), .bfloat16(), .double().
#
# Guess: model.to(torch.bfloat16) and model.bfloat16() are the same; a complex table is cast or left, its turning kept.
# Seen (transformers 5.23.0, torch 2.13.0): the table of cos + i sin is a complex buffer. Module.to(dtype) casts it as it
# casts floats, to its real part, with a warning once in a process; q and k are then scaled by cos and not turned. The
# methods named after a dtype leave complex tensors alone. Even .to(torch.float32) of a float32 model changes its answers.
#
#   as built             complex64   off 0
#   float()              complex64   off 0
#   bfloat16()           complex64   off by its rounding
#   to(torch.float32)    float32     off by more than a tenth
#   to(torch.bfloat16)   bfloat16    off by more than a tenth
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/probe.py" <<'PY'
import copy

import torch
from transformers import Llama4VisionConfig, Llama4VisionModel

torch.manual_seed(0)
config = Llama4VisionConfig(
    hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=112, patch_size=14,
    vision_output_dim=64, projector_input_dim=64, projector_output_dim=64,
)
model = Llama4VisionModel(config).eval()
with torch.no_grad():
    for name, p in model.named_parameters():  # attention as sharp as trained ones have
        if "self_attn" in name and name.endswith("weight"):
            p.normal_(std=0.3)
image = torch.randn(1, 3, 112, 112)
CASES = (
    ("as built", lambda m: m, "complex64", 0.0),
    ("float()", lambda m: m.float(), "complex64", 0.0),
    ("bfloat16()", lambda m: m.bfloat16(), "complex64", 0.08),
    ("to(torch.float32)", lambda m: m.to(torch.float32), "float32", None),
    ("to(torch.bfloat16)", lambda m: m.to(torch.bfloat16), "bfloat16", None),
)
with torch.no_grad():
    truth = model(image).last_hidden_state
    for name, cast, kind, bound in CASES:
        changed = cast(copy.deepcopy(model))
        (table,) = changed.buffers()
        y = changed(image.to(next(changed.parameters()).dtype)).last_hidden_state.float()
        off = ((y - truth).norm() / truth.norm()).item()
        print(f"{name:<20} {str(table.dtype).removeprefix('torch.'):<11} off {off:.3f}")
        assert str(table.dtype) == f"torch.{kind}"
        assert off > 0.1 if bound is None else off <= bound
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.3.4 pillow==12.0.0 transformers==5.23.0
"$folder/env/bin/python" "$folder/probe.py" 2>/dev/null
