#!/usr/bin/env bash
# Phi-4 multimodal's vision tower is causal or not, depending on how it is called and on what else is in the batch.
#
# Guess: a ViT tower attends in both directions, whatever attn_implementation, padding and torch.compile.
# Seen (transformers 5.23.0, torch 2.13.0, CPU): the layers say is_causal = True. With sdpa, the default, and a batch in
# which no patch is masked, the first token does not see the last; with attn_implementation="eager" it does; with sdpa and
# one masked patch in one image every image of the batch attends in both directions; under torch.compile too. So the same
# image gives other features beside another batch, and other ones compiled.
#
#   sdpa, nothing masked                    first token moved by the last patch: False
#   eager, nothing masked                   first token moved by the last patch: True
#   sdpa, another image has a masked patch  first token moved by the last patch: True
#   sdpa, nothing masked, compiled          first token moved by the last patch: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/probe.py" <<'PY'
import torch
from transformers import Phi4MultimodalVisionConfig, Phi4MultimodalVisionModel

torch.manual_seed(0)
config = Phi4MultimodalVisionConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14,
    crop_size=56,
)
model = Phi4MultimodalVisionModel(config).eval()
images, whole = torch.randn(2, 3, 56, 56), torch.ones(2, 4, 4, dtype=torch.bool)
other = images.clone()
other[0, :, 42:, 42:] += 1.0  # the last patch of the first image
masked = whole.clone()
masked[1, 3, 3] = False


@torch.no_grad()
def sees(call, mask):
    first, second = (call(x, patch_attention_mask=mask).last_hidden_state[0, 0] for x in (images, other))
    return bool((first - second).abs().max() > 1e-3)


assert model.config._attn_implementation == "sdpa"
found = {"sdpa, nothing masked": sees(model, whole), "sdpa, another image has a masked patch": sees(model, masked)}
found["sdpa, nothing masked, compiled"] = sees(torch.compile(model, backend="eager"), whole)
model.set_attn_implementation("eager")
found["eager, nothing masked"] = sees(model, whole)
for name, seen in found.items():
    print(f"{name:<39} first token moved by the last patch: {seen}")
    assert seen == (name != "sdpa, nothing masked")
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.3.4 pillow==12.0.0 transformers==5.23.0
"$folder/env/bin/python" "$folder/probe.py" 2>/dev/null
