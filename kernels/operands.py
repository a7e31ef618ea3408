"""From tensors to what kernels take: matrices with unit column stride, descriptors of them, the precision asked for."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16  # bytes
# a · b + c in one instruction and one rounding, stated at every launch: GELU's polynomial, the exponents of attention
# and the moments of LayerNorm count on it, and Triton 3.9 announces that its own default changes to False
FP_FUSION = True


def as_rows(x: Tensor) -> Tensor:
    """[..., K] as a matrix [M, K] whose columns have stride 1: a view where the strides allow one, else a copy."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def as_vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def are_aligned(*matrices: Tensor) -> bool:
    """Whether rows are apart and begin at multiples of 16 bytes: descriptors need it, pointers are slow without."""
    return all(
        t.data_ptr() % ALIGNMENT == 0 and t.stride(0) * t.itemsize % ALIGNMENT == 0 and t.stride(0) >= t.shape[1]
        for t in matrices
    )


def describe(matrices: Iterable[Tensor], blocks: Iterable[tuple[int, int]]) -> list[TensorDescriptor]:
    """Tensor descriptors of matrices, in blocks of (rows, columns); made by the host, so graphs can capture them."""
    return [
        TensorDescriptor(t, list(t.shape), [t.stride(0), 1], list(block))
        for t, block in zip(matrices, blocks, strict=False)
    ]


def product_precision() -> str:
    """How fp32 products are taken: as PyTorch's own switch says for cuBLAS."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
