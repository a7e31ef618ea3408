#!/usr/bin/env bash
# Qwen-VL's vision towers answer output_attentions=True with what attention returns, not with its maps, in eager mode too.
#
# Guess: as in other models: a map of [batch, heads, tokens, tokens] per layer with attn_implementation="eager", and a
# warning and an empty tuple with sdpa.
# Seen (transformers 5.23.0): one tensor of [tokens, channels] per layer either way. The recorder of attentions takes the
# first output of the attention module, and this one returns no second.
#
#   Qwen2-VL     sdpa   (96, 64)    eager  (96, 64)
#   Qwen2.5-VL   sdpa   (96, 64)    eager  (96, 64)
#   Qwen3-VL     sdpa   (96, 64)    eager  (96, 64)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/probe.py" <<'PY'
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen25
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

TOWERS = {
    "Qwen2-VL": (qwen2.Qwen2VisionTransformerPretrainedModel, {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}),
    "Qwen2.5-VL": (
        qwen25.Qwen2_5_VisionTransformerPretrainedModel,
        {"hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 64, "fullatt_block_indexes": [1]},
    ),
    "Qwen3-VL": (
        qwen3.Qwen3VLVisionModel,
        {"hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 64, "deepstack_visual_indexes": []},
    ),
}
grid = torch.tensor([[1, 8, 12]])
for name, (tower, sizes) in TOWERS.items():
    config = tower.config_class(depth=2, num_heads=4, **sizes)
    patches = torch.randn(96, 3 * config.temporal_patch_size * config.patch_size**2)
    shapes = []
    for implementation in ("sdpa", "eager"):
        model = tower._from_config(config, attn_implementation=implementation).eval()
        with torch.no_grad():
            attentions = model(patches, grid_thw=grid, output_attentions=True).attentions
        shapes.append({tuple(a.shape) for a in attentions})
    print(f"{name:<12} sdpa   {shapes[0]}    eager  {shapes[1]}")
    assert shapes == [{(96, 64)}, {(96, 64)}]
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.3.4 pillow==12.0.0 transformers==5.23.0
"$folder/env/bin/python" "$folder/probe.py" 2>/dev/null
