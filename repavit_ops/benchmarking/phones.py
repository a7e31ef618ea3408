"""Calls in runtimes made for phones, which compute on a PC's CPU too: LiteRT, ExecuTorch, ncnn.

In float32, or, where ``int8`` is asked for, with products in int8: weights per output channel, activations in the call.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..exporting import executorch as pte
from ..exporting import litert as tflite
from .runtimes import Call


def litert(module: nn.Module, x: Tensor, int8: bool = False) -> Call:
    """LiteRT with XNNPACK, on torch's number of threads."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.tflite"
        tflite.write(module, x, file, False)
        content = _in_dynamic_range(file) if int8 else file.read_bytes()
    from ai_edge_litert.interpreter import Interpreter

    interpreter: Any = Interpreter(model_content=content, num_threads=torch.get_num_threads())
    interpreter.allocate_tensors()
    source = interpreter.get_input_details()[0]["index"]
    target = interpreter.get_output_details()[0]["index"]
    image = np.ascontiguousarray(x.numpy())

    def call() -> Tensor:
        interpreter.set_tensor(source, image)
        interpreter.invoke()
        return torch.from_numpy(interpreter.get_tensor(target))

    return call


def _in_dynamic_range(file: Path) -> bytes:
    """A .tflite file in LiteRT's dynamic-range int8."""
    from ai_edge_quantizer import quantizer, recipe

    made = quantizer.Quantizer(str(file))
    made.load_quantization_recipe(recipe.dynamic_wi8_afp32())
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # bars and sizes
        return bytes(made.quantize().quantized_model)


def executorch(module: nn.Module, x: Tensor, int8: bool = False) -> Call:
    """ExecuTorch with XNNPACK, on torch's number of threads."""
    if int8:
        module = _in_xnnpack_int8(module, x)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pte"
        pte.write(module, x, file, False)
        content = file.read_bytes()
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(torch.get_num_threads())
    program = Runtime.get().load_program(content)
    method: Any = program.load_method("forward")

    def call(kept: Any = (program, content)) -> Tensor:  # the method reads both and keeps neither
        return method.execute([x])[0]

    return call


def _in_xnnpack_int8(module: nn.Module, x: Tensor) -> nn.Module:
    """The module as XNNPACK's quantizer annotates it for dynamic int8."""
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as q
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = q.XNNPACKQuantizer()
    quantizer.set_global(q.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters about themselves
        prepared = prepare_pt2e(torch.export.export(module, (x,)).module(), quantizer)
        prepared(x)
        return convert_pt2e(prepared)


def ncnn(module: nn.Module, x: Tensor) -> Call:
    """ncnn on torch's number of threads, nothing of it in float16; takes one image.

    Raises:
        ValueError: x is more than one image.
        RuntimeError: it has no layer for a part of the module.
    """
    if len(x) != 1:
        raise ValueError(f"ncnn takes one image at once, got {len(x)}")
    import ncnn as runtime
    import pnnx

    net = runtime.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    with tempfile.TemporaryDirectory() as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pnnx reads traces, which torch discourages
            torch.jit.trace(module, (x,)).save(f"{folder}/model.pt")
        shape = f"inputshape=[{','.join(map(str, x.shape))}]"
        subprocess.run([pnnx.EXEC_PATH, "model.pt", shape, "fp16=0"], cwd=folder, check=True, capture_output=True)
        if net.load_param(f"{folder}/model.ncnn.param") or net.load_model(f"{folder}/model.ncnn.bin"):
            raise RuntimeError("ncnn has no layer for a part of this model")
    image = runtime.Mat(np.ascontiguousarray(x[0].numpy())).clone()

    def call() -> Tensor:
        with net.create_extractor() as extractor:
            extractor.input("in0", image)
            failed, out = extractor.extract("out0")
            if failed:
                raise RuntimeError(f"ncnn stops with status {failed}")
            return torch.from_numpy(np.array(out)).unsqueeze(0)

    return call
