"""Pure device functions: numbers in registers in, numbers in registers out."""

import triton
import triton.language as tl


@triton.jit
def gelu_erf(x):
    """x Φ(x) in fp32, by erf: 32 instructions."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_sigmoid(x):
    """x Φ(x) within 3.1e-6, far below the rounding of bf16 and fp16: a third of the instructions of erf.

    x·Q(x²) = log2(Φ(x) / Φ(-x)), Q minimax of the error in GELU on the whole line; its leading coefficient is positive,
    so that ±x far out saturate as they must.
    """
    t = x * x
    q = 2.3020431995391846 + t * (
        0.10523097962141037 + t * (-0.0003624936507549137 + t * (-8.782545774010941e-05 + t * 3.2059429031505715e-06))
    )
    return x / (1.0 + tl.exp2(-x * q))


@triton.jit
def gelu_tanh(x):
    """The tanh approximation, as x sigmoid(2u), u = √(2/π) (x + 0.044715 x³): no cancellation for x < 0."""
    return x / (1.0 + tl.exp2(-x * (2.302208198144325 + 0.1029432395800235 * x * x)))  # 2 √(2/π) log2(e) (1, 0.044715)


@triton.jit
def gelu_quick(x):
    """x sigmoid(1.702 x), which OpenAI trained CLIP with."""
    return x / (1.0 + tl.exp2(-2.4554669595930156 * x))  # 1.702 log2(e)


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x / (1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """ACTIVATION of fp32 ``x``: "none" | "silu" | "gelu" | "gelu_tanh" | "gelu_quick"; EXACT asks for fp32 accuracy."""
    if ACTIVATION == "gelu_tanh":
        x = gelu_tanh(x)
    elif ACTIVATION == "gelu_quick":
        x = gelu_quick(x)
    elif ACTIVATION == "silu":
        x = silu(x)
    elif ACTIVATION == "gelu":
        if EXACT:
            x = gelu_erf(x)
        else:
            x = gelu_sigmoid(x)
    return x
