"""LayerNorm's core of rows whose mean is far above their spread: at most PyTorch's error, wherever the kernels norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from repavit_ops import backends, ops
from repavit_ops.stack_plan import Step

REASON = backends.why_unavailable("cpp")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

EPS = 1e-6
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDTHS = (1, 2, 7, 8, 9, 16, 33, 192, 768)


def normal(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 7919 + columns)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def with_element(rows: Tensor, column: int, value: float) -> Tensor:
    rows = rows.clone()
    rows[:, column % rows.shape[1]] = value
    return rows


KINDS = {  # of rows: standard normal numbers → rows
    "plain": lambda n: n,
    "offset_100": lambda n: n + 100,
    "offset_1e4": lambda n: n + 1e4,
    "offset_1e6": lambda n: n + 1e6,
    "offset_minus_1e6": lambda n: n - 1e6,
    "offset_1e4_spread_1e-2": lambda n: n * 1e-2 + 1e4,
    "around_100": lambda n: n * 1e-4 + 100,
    "tiny": lambda n: n * 1e-20,
    "large": lambda n: n * 1e15,
    "first_is_an_outlier": lambda n: with_element(n, 0, 1e4),
    "first_is_far_above_an_offset": lambda n: with_element(n + 1e3, 0, -1e6),
    "last_is_an_outlier": lambda n: with_element(n, -1, 1e4),
    "one_differs": lambda n: with_element(n * 0 + 1234.567, 3, 1234.568),
    "first_differs": lambda n: with_element(n * 0 + 1234.567, 0, 1234.568),
    "ramp": lambda n: torch.arange(n.shape[1], dtype=n.dtype) + 0 * n + 4096,
}


def by_ffn(x: Tensor, eps: float) -> Tensor:
    """The core alone: no hidden channels, the identity as what is merged."""
    c = x.shape[1]
    eye = torch.eye(c, dtype=x.dtype)
    empty = x.new_empty(0, c)
    return ops.partial_gelu_ffn(x, empty, None, empty.t(), eye, None, norm_eps=eps, backend="cpp")


def by_attention(x: Tensor, eps: float) -> Tensor:
    """A token that attends to itself; its values are the core."""
    c = x.shape[1]
    eye = torch.eye(c, dtype=x.dtype)
    w_qkv = torch.cat((torch.zeros(2, c, dtype=x.dtype), eye))
    static = {"num_heads": 1, "scale": 1.0, "d_qk": 1, "norm_eps": eps, "backend": "cpp"}
    return ops.rep_attention(x.unsqueeze(1), w_qkv, None, eye, None, **static).squeeze(1)


def by_patches(x: Tensor, eps: float) -> Tensor:
    """A row is a patch of one pixel."""
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    y = ops.patch_projection(x[:, None, None], eye, None, patch=1, channels_last=True, norm_eps=eps, backend="cpp")
    return y[:, 0, 0]


def by_embedding(x: Tensor, eps: float) -> Tensor:
    """A row is an image of one pixel, its norm that of the model's start; as many images as rows."""
    one, zero = torch.ones(x.shape[1], dtype=x.dtype), torch.zeros(x.shape[1], dtype=x.dtype)
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    static = {"patch": (1, 1), "as_map": False, "norm_eps": eps}
    return ops.fused_blocks(x[:, :, None, None], [Step("token_embedding", (eye, None, None, None, one, zero), static)])[
        :, 0
    ]


def by_head(x: Tensor, eps: float) -> Tensor:
    """The mean of one token."""
    one, zero = torch.ones(x.shape[1], dtype=x.dtype), torch.zeros(x.shape[1], dtype=x.dtype)
    static = {"first": 0, "count": 1, "norm_eps": eps}
    return ops.fused_blocks(x[:, None], [Step("pooled_head", (None, None, one, zero), static)])


WAYS = {f.__name__: f for f in (by_ffn, by_attention, by_patches, by_embedding, by_head)}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def errors(way, x: Tensor) -> tuple[float, float, float]:
    """Greatest error of ours and of PyTorch's, and the greatest element, each over all rows."""
    truth = F.layer_norm(x.double(), x.shape[1:], eps=EPS)
    eager = F.layer_norm(x, x.shape[1:], eps=EPS)
    ours = way(x, EPS)
    assert ours.dtype == x.dtype
    return tuple((t.double() - s).abs().max().item() for t, s in ((ours, truth), (eager, truth), (truth, 0)))


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)  # float64 is the truth
@pytest.mark.parametrize("kind", KINDS)
def test_no_row_loses_more_than_in_pytorch(kind, dtype, way):
    """Beside PyTorch's error a few roundings: of the result, and of what is multiplied to get it."""
    rounding = torch.finfo(dtype).eps / 2 + 2**-22
    for columns in WIDTHS:
        x = KINDS[kind](normal(5, columns)).to(dtype)
        if not x.isfinite().all():
            continue
        ours, eagers, largest = errors(way, x)
        assert ours <= eagers + rounding * largest, f"{columns} channels: {ours:.3g}, PyTorch's {eagers:.3g}"


@every_way
@every_dtype
@pytest.mark.parametrize("value", [12.345, 1234.567, 100.0, -3e-5, 1e-30, 6e4, 0.0, 1.0])
def test_a_constant_row_has_the_core_zero(value, dtype, way):
    for columns in WIDTHS:
        x = torch.full((3, columns), value, dtype=torch.float64).to(dtype)
        assert torch.count_nonzero(way(x, EPS)) == 0, columns


@every_way
def test_an_offset_far_above_the_spread(way):
    """1e6 with spread 1: PyTorch is off by 0.1 there, since its mean is one float."""
    ours, eagers, _ = errors(way, (normal(64, 768) + 1e6).float())
    assert ours < 1e-5 < eagers


@every_way
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad, way):
    x = normal(4, 33).float()
    for column in (0, 5, 32):
        x_bad = x.clone()
        x_bad[1, column] = bad
        y = way(x_bad, EPS)
        assert y[1].isnan().all()
        assert torch.equal(y[[0, 2, 3]], way(x, EPS)[[0, 2, 3]])


@every_way
@pytest.mark.parametrize("number", [1e19, 1e36, 3e38])
def test_sums_and_squares_beyond_all_floats(way, number):
    """PyTorch's variance is +inf there, or its mean, and nothing or NaN comes out."""
    apart = torch.full((3, 768), number)
    apart[1:, ::2] = -number
    first, last = torch.zeros(2, 768), normal(2, 768).float()
    first[:, 0], last[:, -1] = number, -number
    for x in (apart, first, last):
        ours, _, largest = errors(way, x)
        assert ours <= 1e-5 * largest


def test_a_block_around_100_keeps_its_digits():
    """An FFN that norms and adds x back: the norm was all that could lose them."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(197, 64, generator=g) * 1e-2 + 100
    w_in, w_out = torch.randn(64, 64, generator=g) / 8, torch.randn(64, 64, generator=g) / 8

    def run(*tensors, backend):
        x, w_in, w_out = tensors
        return ops.partial_gelu_ffn(x, w_in, None, w_out, None, None, norm_eps=EPS, backend=backend).double()

    truth = run(*(t.double() for t in (x, w_in, w_out)), backend="reference")
    error, eagers = (
        (run(x, w_in, w_out, backend=backend) - truth).abs().max().item() for backend in ("cpp", "reference")
    )
    assert error <= eagers
