"""Which part of a block each call of a forward belongs to, for models of any library.

No names are needed. Softmax marks an attention: the innermost module around it that multiplies by weights both before
and behind it has the q, k, v projections before and the output projection behind. An activation marks an FFN in the
same way. A norm belongs to the half whose products it stands in front of.
"""

from __future__ import annotations

from .recording import Call

PATCH, REST = "patch embedding", "rest"
NORM, QKV, CORE, PROJ, WHOLE = (f"attention: {part}" for part in ("norm", "qkv", "core", "proj", "in one call"))
FFN_NORM, FFN_IN, ACTIVATION = (f"FFN: {part}" for part in ("norm", "in", "activation"))
FFN_OUT, MERGED = "FFN: out", "FFN: merged"
PARTS = (PATCH, NORM, QKV, CORE, PROJ, WHOLE, FFN_NORM, FFN_IN, ACTIVATION, FFN_OUT, MERGED, REST)
MERGED_WEIGHT = "w_merged"  # of this library's deployed modules: the matrix that stands for idle channels


def parts_of(calls: list[Call]) -> list[str]:
    """The part of every call; fused modules, which hold several, are "rest" here."""
    sorter = _Sorter(calls)
    for index, call in enumerate(calls):
        if call.kind == "core":
            sorter.attention(index)
        elif call.kind == "whole attention":
            sorter.parts[index] = WHOLE
    for index, call in enumerate(calls):  # afterwards: attention may hold activations, as SwinV2's of its position bias
        if call.kind == "activation" and sorter.parts[index] is None:
            sorter.ffn(index)
    sorter.embedding()
    return [part or REST for part in sorter.parts]


class _Sorter:
    """The parts of calls as far as they are known."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls
        self.parts: list[str | None] = [None] * len(calls)

    def attention(self, marker: int) -> None:
        """The attention around a softmax."""
        if (found := self._around(marker)) is None:
            return
        before, behind = found
        for index in before:
            self.parts[index] = QKV
        self.parts[behind[0]] = PROJ
        self._between(before[0], behind[0], CORE)
        self._norm_before(before[0], NORM)

    def ffn(self, marker: int) -> None:
        """The FFN around an activation."""
        if (found := self._around(marker)) is None:
            return
        before, behind = found
        later = [i for i in range(marker, len(self.calls)) if self.calls[i].kind == "core"]
        behind = [i for i in behind if not later or i < later[0]] or behind[:1]
        first = self.calls[before[0]].shape
        for index in before:
            self.parts[index] = FFN_IN
        merged = [i for i in behind if self.calls[i].weight.endswith(MERGED_WEIGHT)]
        products = [i for i in behind if i not in merged]
        for index in merged:
            self.parts[index] = MERGED
        for index in products:  # of a gated FFN the other projection may stand behind the activation
            self.parts[index] = FFN_IN if self.calls[index].shape == first and index != products[-1] else FFN_OUT
        self._between(before[0], behind[-1], ACTIVATION)
        self._norm_before(before[0], FFN_NORM)

    def embedding(self) -> None:
        """Convolutions in front of the first block."""
        known = [i for i, part in enumerate(self.parts) if part is not None or self.calls[i].kind == "fused"]
        first = known[0] if known else 0
        for index, call in enumerate(self.calls[:first]):
            if call.kind == "conv":
                self.parts[index] = PATCH

    def _around(self, marker: int) -> tuple[list[int], list[int]] | None:
        """Products of no known part before and behind a call, in the innermost module below the model with both."""
        for span in reversed(self.calls[marker].spans[1:]):
            free = [
                i
                for i, call in enumerate(self.calls)
                if call.kind == "linear" and self.parts[i] is None and span in call.spans
            ]
            before, behind = [i for i in free if i < marker], [i for i in free if i > marker]
            if before and behind:
                return before, behind
        return None

    def _between(self, first: int, last: int, part: str) -> None:
        for index in range(first, last):
            if self.parts[index] is None:
                self.parts[index] = part

    def _norm_before(self, index: int, part: str) -> None:
        """The norm nearest in front of a call, with no product in between."""
        for earlier in range(index - 1, -1, -1):
            kind = self.calls[earlier].kind
            if kind == "norm" and self.parts[earlier] is None:
                self.parts[earlier] = part
                return
            if kind in ("linear", "conv", "fused", "core"):
                return
