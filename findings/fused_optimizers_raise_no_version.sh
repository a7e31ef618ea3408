#!/usr/bin/env bash
# A fused optimizer of PyTorch changes parameters behind autograd's back.
#
# Guess: every optimizer writes its parameters in place, so each step raises their version counters, and a backward pass
# through a graph that was made before the step is refused ("modified by an inplace operation").
# Seen (torch 2.13.0, CPU): with foreach and with plain loops it is so. With fused=True no counter moves, and the backward
# pass runs: it takes the new weights for the old ones and returns gradients of neither. Whatever watches `_version`
# (caches of packed or cast weights) misses every step.
#
#   SGD      plain: version +1, backward refused      fused: version +0, gradient off by 0.200
#   Adam     plain: version +1, backward refused      fused: version +0, gradient off by 0.200
#   AdamW    plain: version +2, backward refused      fused: version +0, gradient off by 0.220
#   Adagrad  plain: version +1, backward refused      fused: version +0, gradient off by 0.200
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/probe.py" <<'PY'
import torch

for kind in ("SGD", "Adam", "AdamW", "Adagrad"):
    told = []
    for name, options in (("plain", {"foreach": False}), ("fused", {"fused": True})):
        weight = torch.nn.Parameter(torch.ones(8, dtype=torch.float64))
        weight.grad = torch.ones_like(weight)
        optimizer = getattr(torch.optim, kind)([weight], lr=0.1, weight_decay=0.1 if kind == "AdamW" else 0.0, **options)
        loss = (weight * weight).sum()  # its gradient is 2 where the weight is 1
        before = weight._version
        optimizer.step()
        optimizer.zero_grad()
        try:
            loss.backward()
            outcome = f"gradient off by {abs(weight.grad[0].item() - 2.0):.3f}"
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            outcome = "backward refused"
        told.append(f"{name}: version +{weight._version - before}, {outcome}")
        assert (weight._version == before) == (name == "fused") and ("off by" in outcome) == (name == "fused")
    print(f"{kind:<8} {told[0]:<42} {told[1]}")
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.3.4
"$folder/env/bin/python" "$folder/probe.py"
