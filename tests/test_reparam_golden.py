"""Our merge of the authors' training checkpoints equals what their own code deployed, float32 rounding apart."""

import json
import re
from pathlib import Path

import pytest
from reparam_helpers import relative_error
from safetensors import safe_open

from repavit_ops.reparam import active_channels, batchnorm_affine, merge_channel_idle_ffn

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


def load(path):
    with safe_open(path, framework="pt") as f:
        return {key: f.get_tensor(key) for key in f.keys()}, json.loads(f.metadata()["config"])  # noqa: SIM118


@pytest.mark.golden
@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the authors' golden vectors are not beside this checkout")
@pytest.mark.parametrize("name", ["vit_idle075", "vit_idle050", "swin_idle075"])
def test_merge_equals_the_authors_deployed_weights(name):
    train, config = load(GOLDEN / f"{name}.train.safetensors")
    deployed, _ = load(GOLDEN / f"{name}.deployed.safetensors")
    mlps = sorted({m[1] for key in train if (m := re.match(r"(.*\.mlp\.)fc1", key))})
    assert mlps
    for mlp in mlps:
        p = {key.removeprefix(mlp): t for key, t in train.items() if key.startswith(mlp)}
        norm1, norm2 = (
            batchnorm_affine(*(p[f"{n}.{s}"] for s in ("weight", "bias", "running_mean", "running_var")), 1e-5)
            for n in ("norm1", "norm2")
        )
        m = active_channels(p["fc1.weight"].shape[0], config["idle_ratio"])
        fc1, fc2 = (p["fc1.weight"], p["fc1.bias"]), (p["fc2.weight"], p["fc2.bias"])
        merged = merge_channel_idle_ffn(*fc1, *fc2, m, input_affine=norm1, hidden_affine=norm2)
        theirs = {
            "w_merged": "fc1.weight",
            "bias": "fc1.bias",
            "w_in": "fc2.weight",
            "b_in": "fc2.bias",
            "w_out": "fc3.weight",
        }
        for ours, key in theirs.items():
            assert relative_error(getattr(merged, ours), deployed[mlp + key].double()) <= 1e-5, (mlp, ours)
