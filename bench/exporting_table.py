"""Other runtimes on merged models, as one would do it and right:  python bench/exporting_table.py [ROW ...] [--write]

Each figure is the greatest error of the logits over the greatest logit, against float64, for two models whose weights
are drawn as wide as trained ones are: with those of a fresh model, GELU's two forms are the same. Each row runs in a
process of its own, so that a runtime that dies takes no other with it; one that is not installed is said to be missing.
``--write`` puts the rows into the table of docs/exporting.md, whose other rows stay. The runtimes, beside torch:

    pip freeze | grep ^torch== > keep.txt
    pip install -c keep.txt onnx onnxscript onnxruntime openvino executorch litert-torch MNN ncnn pnnx coremltools
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import repavit_ops
from repavit_ops.exporting import checked, executorch, litert, onnx
from repavit_ops.models import create_model

PAGE = Path(__file__).resolve().parents[1] / "docs/exporting.md"
BEGIN, END = "<!-- exporting_table.py begin -->", "<!-- exporting_table.py end -->"
MODELS = ("repa_deit_tiny", "joined_vit_tiny_4")
MINUTES = 15  # of one row

Run = Callable[[nn.Module, Tensor, Path], Tensor | None]  # (model, x, folder) → logits; None: written, not run


class Row(NamedTuple):
    """A runtime with one setting of it.

    Args:
        package: what says its version. setting: in words. run: writes and runs there.
    """

    package: str
    setting: str
    run: Run


@torch.no_grad()
def merged(name: str) -> nn.Module:
    """A merged model whose activations are as wide as a trained one's."""
    torch.manual_seed(0)
    model = create_model(name).eval()
    for key, p in model.named_parameters():
        if p.dim() > 1 and "embed" not in key and "token" not in key:
            p.normal_(0, p[0].numel() ** -0.5 if "patch" in key else p.shape[-1] ** -0.5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    if "joined" in name:
        repavit_ops.set_join(model, 1.0)
    return repavit_ops.reparameterize(model)


# --- ONNX and what reads it -------------------------------------------------------------------------------------------


def by_export(suffix: str, dtype: torch.dtype = torch.float32) -> Run:
    """What ``repavit-ops export`` writes, in the runtime that it is checked in."""
    target = checked.TARGETS[suffix]

    def run(model: nn.Module, x: Tensor, folder: Path) -> Tensor:
        file = folder / f"model{suffix}"
        target.write(model.to(dtype), x.to(dtype), file, False)
        return target.run(file, x.to(dtype))[1]

    return run


def plain_onnx(model: nn.Module, x: Tensor, file: Path) -> None:
    """PyTorch's own defaults."""
    program: Any = torch.onnx.export(
        model, (x,), dynamo=True, input_names=["images"], output_names=["outputs"], verbose=False
    )
    program.save(file, external_data=False)


def onnxruntime_default(model: nn.Module, x: Tensor, folder: Path) -> Tensor:
    plain_onnx(model, x, folder / "model.onnx")
    return onnx.run(folder / "model.onnx", x)[1]


def mnn(ours: bool) -> Run:
    def run(model: nn.Module, x: Tensor, folder: Path) -> Tensor:
        import MNN

        source, target = folder / "model.onnx", folder / "model.mnn"
        if ours:
            onnx.write(model, x, source, False)
        else:
            plain_onnx(model, x, source)
        convert = ("-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target), "--bizCode", "mnn")
        subprocess.run([str(Path(sys.executable).parent / "mnnconvert"), *convert], check=True, capture_output=True)
        net = MNN.nn.load_module_from_file(str(target), ["images"], ["outputs"])
        image = MNN.expr.const(x.numpy(), list(x.shape), MNN.expr.NCHW)
        out = MNN.expr.convert(net.forward([image])[0], MNN.expr.NCHW)
        return torch.from_numpy(out.read().copy()).reshape(x.shape[0], -1)

    return run


# --- runtimes that take PyTorch's programs ----------------------------------------------------------------------------


def openvino(**options: str) -> Run:
    def run(model: nn.Module, x: Tensor, folder: Path) -> Tensor:
        import openvino as ov

        compiled = ov.compile_model(ov.convert_model(model, example_input=x), "CPU", options)
        return torch.from_numpy(compiled([x.numpy()])[0].copy())

    return run


def openvino_compile(model: nn.Module, x: Tensor, folder: Path) -> Tensor:
    import openvino.torch  # noqa: F401 - what PyTorch knows the backend from

    options = {"config": {"INFERENCE_PRECISION_HINT": "f32"}}
    return torch.compile(model, backend="openvino", options=options)(x)


def pnnx_ncnn(full: bool) -> Run:
    """With ``full``, neither weights nor what lies between layers in float16."""

    def run(model: nn.Module, x: Tensor, folder: Path) -> Tensor:
        import ncnn
        import numpy as np
        import pnnx

        pnnx.export(model, str(folder / "model.pt"), (x,), **({"fp16": False} if full else {}))
        net = ncnn.Net()
        if full:
            net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        net.load_param(str(folder / "model.ncnn.param"))
        net.load_model(str(folder / "model.ncnn.bin"))
        with net.create_extractor() as extractor:
            extractor.input("in0", ncnn.Mat(x[0].numpy()).clone())
            _, out = extractor.extract("out0")
            return torch.from_numpy(np.array(out)).reshape(1, -1)

    return run


def litert_dynamic(model: nn.Module, x: Tensor, folder: Path) -> Tensor:
    import litert_torch

    pair, batch = x.repeat(2, 1, 1, 1), torch.export.Dim("batch", min=1, max=8)
    litert_torch.convert(model, (pair,), dynamic_shapes=({0: batch},)).export(str(folder / "model.tflite"))
    return litert.run(folder / "model.tflite", x)[1]


def executorch_plain(model: nn.Module, x: Tensor, folder: Path) -> Tensor:
    """In bfloat16, as for a GPU."""
    executorch.write(model.bfloat16(), x.bfloat16(), folder / "model.pte", False)
    return executorch.run(folder / "model.pte", x.bfloat16())[1]


def coreml(**options: Any) -> Run:
    def run(model: nn.Module, x: Tensor, folder: Path) -> None:
        import coremltools as ct

        chosen = {key: getattr(ct.precision, value) for key, value in options.items()}
        program = torch.export.export(model, (x,)).run_decompositions({})  # it stops at a traced model beside numpy 2.4
        ct.convert(program, **chosen).save(str(folder / "model.mlpackage"))

    return run


FP32 = "float32 by `repavit-ops export`"
FP16 = "float16 by `repavit-ops export --precision fp16`"
ROWS: dict[str, Row] = {
    "onnxruntime": Row("onnxruntime", "PyTorch's default opset", onnxruntime_default),
    "onnxruntime_right": Row("onnxruntime", FP32, by_export(".onnx")),
    "onnxruntime_fp16": Row("onnxruntime", FP16, by_export(".onnx", torch.float16)),
    "mnn": Row("MNN", "from PyTorch's default opset", mnn(ours=False)),
    "mnn_right": Row("MNN", "from the .onnx of `repavit-ops export`", mnn(ours=True)),
    "executorch": Row("executorch", "bfloat16, XNNPACK", executorch_plain),
    "executorch_right": Row("executorch", FP32, by_export(".pte")),
    "executorch_fp16": Row("executorch", FP16, by_export(".pte", torch.float16)),
    "litert": Row("litert-torch", "a dynamic batch", litert_dynamic),
    "litert_bf16": Row("litert-torch", "bfloat16", by_export(".tflite", torch.bfloat16)),
    "litert_right": Row("litert-torch", FP32, by_export(".tflite")),
    "ncnn": Row("ncnn", "`pnnx.export(model, …)`", pnnx_ncnn(full=False)),
    "ncnn_right": Row("ncnn", "`fp16=False`, and `net.opt.use_fp16_*` off", pnnx_ncnn(full=True)),
    "openvino": Row("openvino", "`compile_model(convert_model(model), 'CPU')`", openvino()),
    "openvino_right": Row("openvino", "`INFERENCE_PRECISION_HINT` f32", openvino(INFERENCE_PRECISION_HINT="f32")),
    "openvino_compile": Row("openvino", "`torch.compile(backend='openvino')` with that hint", openvino_compile),
    "coreml": Row("coremltools", "`ct.convert(program)`: float16", coreml()),
    "coreml_right": Row("coremltools", "`compute_precision` FLOAT32", coreml(compute_precision="FLOAT32")),
}


# --- one row in a process of its own ----------------------------------------------------------------------------------


def one(name: str, model_name: str) -> str:
    """The error of one row on one model, or what became of it."""
    row = ROWS[name]
    model = merged(model_name)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth = merged(model_name).double()(x.double())
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # pnnx writes beside itself
            out = row.run(model, x, Path(folder))
    return "converts; not run" if out is None else f"{checked.relative(out, truth):.1e}"


def asked(name: str, model_name: str) -> str:
    """What :func:`one` says in another process, or how that ended."""
    command = [sys.executable, __file__, "--one", name, model_name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES, env={**os.environ})
    except subprocess.TimeoutExpired:
        return f"no answer in {MINUTES} minutes"
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == 0 and last.startswith("{"):
        return json.loads(last)["outcome"]
    error = (done.stderr.strip().splitlines() or [f"died with status {done.returncode}"])[-1]
    print(f"{name}, {model_name}: {error}", file=sys.stderr)
    return "raises" if done.returncode == 1 else f"dies ({done.returncode})"


def measured(names: list[str]) -> list[str]:
    lines: list[str] = []
    for name in names:
        row = ROWS[name]
        try:
            version = metadata.version(row.package)
        except metadata.PackageNotFoundError:
            lines.append(f"| {row.package} | {row.setting} | not installed | |")
            continue
        cells = [asked(name, model) for model in MODELS]
        lines.append(f"| {row.package} {version} | {row.setting} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def merged_table(old: str, rows: list[str]) -> str:
    """The table with ``rows`` in the place of those of the same runtime and setting, in the order of :data:`ROWS`."""

    def key(line: str) -> tuple[str, str]:
        _, runtime, setting, *_ = (cell.strip() for cell in line.split("|"))
        return runtime.split()[0], setting

    found = {key(line): line for line in [*old.splitlines(), *rows] if line.startswith("| ")}
    heading = [f"| runtime | setting | {' | '.join(f'`{name}`' for name in MODELS)} |", "|---|---|---|---|"]
    return "\n".join([*heading, *(found[k] for row in ROWS.values() if (k := (row.package, row.setting)) in found)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--write", action="store_true", help="put the table into docs/exporting.md")
    parser.add_argument("--one", nargs=2, metavar=("ROW", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            outcome = one(*arguments.one)
        print(json.dumps({"outcome": outcome}))
        return
    if unknown := set(arguments.rows) - set(ROWS):
        raise SystemExit(f"ROW: got {', '.join(sorted(unknown))}, wanted some of {', '.join(ROWS)}")
    rows = measured(arguments.rows or list(ROWS))
    if arguments.write:
        text = PAGE.read_text()
        begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        PAGE.write_text(f"{text[:begin]}\n{merged_table(text[begin:end], rows)}\n{text[end:]}")


if __name__ == "__main__":
    main()
