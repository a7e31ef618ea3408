"""Triton GPU kernels, installed as ``repavit_ops.kernels``. Importing this asks for neither a GPU nor triton."""

OPERATORS: tuple[str, ...] = ()  # operators that have a Triton kernel; CUDA tensors of the others run in plain PyTorch
