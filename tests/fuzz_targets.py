"""What the coverage-guided fuzzer and the short tests feed bytes to: checkpoint files, and packed buffers.

Each target takes bytes and raises only where something is wrong: an error of another kind than users are promised, or
memory beyond what the bytes can mean.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import torch
from fuzz_cases import require_message
from model_helpers import tiny_vit
from safetensors.torch import save

import repavit_ops
from repavit_ops.checkpoints.shards import INDEX

OP = torch.ops.repavit_ops
REFUSED = (ValueError, FileNotFoundError)
SUFFIXES = (".safetensors", ".pth", INDEX)
FOLDER = Path(tempfile.mkdtemp(prefix="repavit_fuzz_"))


def checkpoint_seeds() -> list[bytes]:
    """Whole files of each kind, their kind in front."""
    model = tiny_vit(embed_dim=12, depth=1)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    seeds = []
    for number, suffix in enumerate(SUFFIXES[:2]):
        path = FOLDER / f"seed{suffix}"
        repavit_ops.save_checkpoint(model, path)
        seeds.append(bytes([number]) + path.read_bytes())
    buffer = io.BytesIO()
    torch.save({"model": state, "args": {"idle_ratio": 0.75}}, buffer)
    seeds.append(bytes([1]) + buffer.getvalue())
    seeds.append(bytes([0]) + save(state, metadata={"format": "pt"}))
    (FOLDER / "a.safetensors").write_bytes(save(state))
    index = {"weight_map": dict.fromkeys(state, "a.safetensors")}
    return [*seeds, bytes([2]) + json.dumps(index).encode()]


def load_bytes(data: bytes) -> None:
    """A checkpoint of these bytes loads, or is refused with a message; it runs no code."""
    if not data:
        return
    path = FOLDER / f"case{SUFFIXES[data[0] % len(SUFFIXES)]}"
    path.write_bytes(data[1:])
    try:
        model = repavit_ops.load_checkpoint(path, num_heads=3, idle_ratio=0.75)
    except REFUSED as error:
        require_message(error)
        return
    except TypeError as error:
        if "describes its model completely" in str(error):
            return
        raise
    assert isinstance(model, torch.nn.Module)


def packed_seeds() -> list[bytes]:
    """Packed weights of each operator, its number in front."""
    torch.manual_seed(0)
    w, wide, tall = torch.randn(6, 5), torch.randn(12, 5), torch.randn(5, 4)
    buffers = (
        OP.partial_gelu_ffn_pack(w, w.t().contiguous(), torch.randn(5, 5)),
        OP.rep_attention_pack(wide, tall, num_heads=2, d_qk=2),
        OP.patch_projection_pack(w),
        OP.gated_ffn_pack(w, w, w.t().contiguous(), torch.randn(5, 5)),
    )
    return [bytes([number]) + b.numpy().tobytes() for number, b in enumerate(buffers)]


def use_packed(data: bytes) -> None:
    """A packed buffer of these bytes is unpacked and computed with, or refused; results have the weights' sizes."""
    if not data:
        return
    buffer = torch.frombuffer(bytearray(data[1:]), dtype=torch.uint8) if len(data) > 1 else torch.empty(0).byte()
    number = data[0] % 4
    unpack = (*(OP.partial_gelu_ffn_unpack, OP.rep_attention_unpack, OP.patch_projection_unpack, OP.gated_ffn_unpack),)[
        number
    ]
    try:
        weights = unpack(buffer)
        assert sum(t.nbytes for t in weights) <= 2 * len(data)
    except RuntimeError as error:
        require_message(error)
    x, w = torch.ones(3, 5), torch.zeros(6, 5)
    calls = (
        lambda: OP.partial_gelu_ffn(x, w, None, w.t(), torch.zeros(5, 5), None, buffer),
        lambda: OP.rep_attention(
            *(x[None], torch.zeros(12, 5), None, torch.zeros(5, 4), None, *[None] * 5, buffer),
            num_heads=2,
            scale=1.0,
            d_qk=2,
        ),
        lambda: (
            OP.patch_projection(torch.ones(1, 1, 1, 5), w, None, buffer, patch=[1, 1], channels_last=True)
            if buffer.numel() % 2
            else OP.patch_projection(torch.ones(1, 1, 1, 5), w, None, buffer, patch=[1, 5], channels_last=False)
        ),
        lambda: OP.gated_ffn(x, w, None, w, None, w.t(), torch.zeros(5, 5), None, buffer, activation="silu"),
    )
    try:
        y = calls[number]()
        assert y.numel() <= 64
    except RuntimeError as error:
        require_message(error)


TARGETS = {"checkpoints": (load_bytes, checkpoint_seeds), "packed": (use_packed, packed_seeds)}
