"""Checkpoint files and packed buffers with some bytes changed: refused, or right; ``make fuzz`` looks further."""

from __future__ import annotations

import random

import pytest
import torch
from fuzz_cases import EXAMPLES
from fuzz_targets import TARGETS

from repavit_ops import backends

REASON = backends.why_unavailable("cpp")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
NUMBERS = (0, 1, 0x7F, 0xFF, 2**16, 2**31 - 1, 2**32, 2**62, 2**63 - 1, 2**64 - 1)


def changed(data: bytes, chance: random.Random) -> bytes:
    """One to four edits: a bit, a run of bytes, a number of eight bytes, a cut, a repetition."""
    edited = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(1, max(len(edited), 2)) if chance.random() < 0.5 else chance.randrange(1, 72)
        kind = chance.randrange(5)
        if kind == 0:
            edited[at : at + 1] = bytes([(edited[at] if at < len(edited) else 0) ^ (1 << chance.randrange(8))])
        elif kind == 1:
            edited[at : at + 4] = chance.randbytes(4)
        elif kind == 2:
            at -= (at - 1) % 8  # behind the first byte, which is the target's, numbers stand at multiples of eight
            edited[at : at + 8] = chance.choice(NUMBERS).to_bytes(8, "little")
        elif kind == 3:
            del edited[at:]
        else:
            edited[at:at] = edited[at : at + chance.randrange(64)]
    return bytes(edited)


@pytest.mark.parametrize("name", TARGETS)
def test_changed_bytes(name):
    target, seeds = TARGETS[name]
    chance = random.Random(EXAMPLES if EXAMPLES < 100 else None)
    for seed in seeds():
        target(seed)
        for _ in range(2 * EXAMPLES):
            target(changed(seed, chance))


def test_the_targets_notice_what_is_wrong(monkeypatch):
    """A loader that raised something else, or gave no model, would be found."""
    load, seeds = TARGETS["checkpoints"]
    for wrong in (lambda *_, **__: 1 / 0, lambda *_, **__: None):
        monkeypatch.setattr("repavit_ops.load_checkpoint", wrong)
        with pytest.raises((ZeroDivisionError, AssertionError)):
            load(seeds()[0])
    use, seeds = TARGETS["packed"]
    x = torch.zeros(1)
    monkeypatch.setattr("fuzz_targets.OP.partial_gelu_ffn_unpack", lambda _: [x.expand(2**20)], raising=False)
    with pytest.raises(AssertionError):
        use(seeds()[0])
