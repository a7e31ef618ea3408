"""Calls in other runtimes, on the same weights, threads and precision."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Call = Callable[[], Any]


def compiled(function: Callable[..., Tensor], *args: Any) -> Call:
    """torch.compile of ``function(x, *weights)`` with frozen weights and max-autotune."""

    class Frozen(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i, t in enumerate(args[1:]):
                self.register_buffer(f"t{i}", t)

        def forward(self, x: Tensor) -> Tensor:
            return function(x, *(getattr(self, f"t{i}") for i in range(len(args) - 1)))

    return compiled_module(Frozen().eval(), args[0])


def compiled_module(module: torch.nn.Module, x: Tensor) -> Call:
    """torch.compile of a module with frozen weights and max-autotune, at x's shape."""
    return _frozen(module, x, {"freezing": True, "max_autotune": True}, fullgraph=True)


def zentorch(module: torch.nn.Module, x: Tensor) -> Call:
    """AMD's backend of torch.compile, with frozen weights, at x's shape."""
    import zentorch  # noqa: F401 - what PyTorch knows the backend from

    return _frozen(module, x, {"freezing": True}, backend="zentorch")


def _frozen(module: torch.nn.Module, x: Tensor, settings: dict[str, Any], **options: Any) -> Call:
    """torch.compile with inductor's settings, compiled before it is returned."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    with inductor.patch(settings):
        fast = torch.compile(module, **options)
        with torch.no_grad():
            fast(x)

    def call() -> Tensor:
        with torch.no_grad():
            return fast(x)

    return call


def iree(module: torch.nn.Module, x: Tensor) -> Call:
    """IREE's compiler for this CPU, in float32, on as many of its workers as torch has threads."""
    import iree.compiler
    import iree.runtime
    import iree.turbine.aot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own trees
        program = str(iree.turbine.aot.export(module, x).mlir_module)
    options = ["--iree-llvmcpu-target-cpu=host", "--iree-opt-level=O3"]
    code = iree.compiler.compile_str(program, target_backends=["llvm-cpu"], input_type="torch", extra_args=options)
    iree.runtime.flags.parse_flags(f"--task_topology_max_group_count={torch.get_num_threads()}")
    context: Any = iree.runtime.SystemContext(config=iree.runtime.Config("local-task"))
    context.add_vm_module(iree.runtime.VmModule.copy_buffer(context.instance, code))
    image = iree.runtime.asdevicearray(context.config.device, np.ascontiguousarray(x.numpy()))
    return lambda: torch.from_numpy(context.modules.module.main(image).to_host().copy())


def onnx_bytes(module: torch.nn.Module, x: Tensor) -> bytes:
    """A module as ONNX, at x's shape; the input is named x."""
    file: Any = io.BytesIO()  # which save takes, though it says a path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own exporter about itself
        program = torch.onnx.export(module, (x,), dynamo=True, input_names=["x"], verbose=False)
    assert program is not None
    program.save(file)
    return file.getvalue()


def onnx_runtime(model: bytes, x: Tensor) -> Call | None:
    """ONNX Runtime in fp32 with torch's number of threads; None where it is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": np.ascontiguousarray(x.numpy())}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(model: bytes | torch.nn.Module, x: Tensor, dtype: torch.dtype) -> Call | None:
    """OpenVINO with its inference precision set to ``dtype``, from ONNX or PyTorch; None where it is not installed."""
    if importlib.util.find_spec("openvino") is None:
        return None
    import openvino as ov

    hints = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
    config = {
        "INFERENCE_PRECISION_HINT": hints[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = ov.Core()
    network = core.read_model(model) if isinstance(model, bytes) else ov.convert_model(model, example_input=x.float())
    network.reshape(list(x.shape))
    request = core.compile_model(network, "CPU", config).create_infer_request()
    tensor = ov.Tensor(np.ascontiguousarray(x.float().numpy()))
    request.set_input_tensor(tensor)

    def call() -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    return call
