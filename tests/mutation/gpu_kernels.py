"""Mutants of the Triton kernels, chosen by hand:  python tests/mutation/gpu_kernels.py [NUMBER ...]

Each is written into a copy of the tree, and the interpreted tests that are about its file run there, without a GPU.
What they let pass is listed; docs/reliability.md says why each may.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 400  # for one run; a mutant that loops is killed too
LINEAR, FFN, ATTENTION, WINDOWS, INT8 = (
    f"tests/interpreted/test_{name}_kernel{end}.py"
    for name, end in (("linear", ""), ("ffn", "s"), ("attention", ""), ("window", ""), ("int8", "s"))
)

# (file, the place with «what is replaced», what replaces it, tests)
MUTANTS = (
    ("tile", "return («first + within % height») * BM", "within % height", LINEAR),
    ("tile", "within // height * «BN»", "BM", LINEAR),
    ("tile", "mask=«col[None, :] < cols», other=0.0)", "col[None, :] < cols + 1", LINEAR),
    ("tile", "count = tl.minimum(«K - k», BK)", "BK", LINEAR),
    ("tile", "share = «count / (k + count)»", "count / K", LINEAR),
    ("tile", "delta * delta * («k» * share)", "count", LINEAR),
    ("tile", "* (k * share)\n    rstd = 1.0 / tl.sqrt_rn(«squares / K + eps»)", "squares / K", LINEAR),
    ("tile", "scale = tl.where(within, scale, «SHRINK»)", "1.0", LINEAR),
    ("tile", "return «mean + rest», 1.0", "mean", LINEAR),
    ("tile", "squares / K - «rest * rest»", "0.0", LINEAR),
    ("tile", "variance + eps * SHRINK * SHRINK + «SMALLEST»", "0.0", LINEAR),
    ("tile", "«tl.where(variance < 0, 0.0, variance)»", "variance", LINEAR),
    ("tile", "        col0 += «BN // 2»", "BN", LINEAR),
    ("tile", "tl.load(bias + col, mask=«col < N», other=0.0)", "col < N - 1", LINEAR),
    ("tile", "at = residual + row.to(tl.int64)[:, None] * «residual_stride»", "out_stride", LINEAR),
    ("linear", "activation, «norm_eps is not None» and k > 0", "False", LINEAR),
    ("device_math", "0.5 * x * («1.0» + tl.erf", "0.999", LINEAR),
    ("device_math", "«0.1029432395800235» * x * x", "0.1", LINEAR),
    ("partial_gelu_ffn", "BM, BN, BK, «EVEN_H», TMA", "EVEN_C", FFN),
    ("partial_gelu_ffn", "shortcut = x if «residual» else None", "False", FFN),
    ("on_chip_ffn", "tl.load(b_in + col, mask=«col < H», other=0.0)", "col < H - 1", FFN),
    ("on_chip_ffn", "weight = load_tile(w_merged, merged_stride, «i * BC», C, k,", "0", FFN),
    ("on_chip_ffn", "residual_stride, y, y_stride, row0, M, «i * BC», C,", "0", FFN),
    ("sequences", "«down * across»)\n", "across", WINDOWS),
    ("sequences", "_region(i, padded_h, wh, task.shift_h) * «3»", "1", WINDOWS),
    ("sequences", "(position >= «extent - window»)", "extent - window + 1", WINDOWS),
    ("sequences", "(position >= «extent - shift»)", "extent", WINDOWS),
    ("sequences", "i, j = (i + task.shift_h) % «task.height»", "padded_h", WINDOWS),
    ("sequences", "row = («i * task.width + j»)", "i * task.height + j", WINDOWS),
    ("sequences", "row = («sequence // windows»)", "sequence * 0", WINDOWS),
    ("sequences", "present[:, None] & (column < D), other=«absent»)", "0.0", WINDOWS),
    ("sequences", "column = task.heads * task.d_qk + task.head * «task.d_v»", "task.d_qk", ATTENTION),
    ("sequences", "[:, None] & (key < «task.tokens»)[None, :]", "task.tokens + 1", ATTENTION),
    ("attention", "peak == MINUS_INFINITY, «0.0», peak)", "peak", ATTENTION),
    ("attention", "return acc, «total * rescale» + tl.sum(p, 1)", "total", ATTENTION),
    ("attention", "_scaled(task, acc, «rescale»)", "1.0", ATTENTION),
    ("attention", "total = tl.where(«total == 0», 1.0, total)", "total < 0", ATTENTION),
    ("attention", "s = tl.where((key < «task.tokens»)[None, :], s,", "task.tokens + 1", ATTENTION),
    ("attention", "s, «s + SHIFT_MASK»)", "s", WINDOWS),
    ("attention", "        min(group, «sequences - sequence»),", "group", WINDOWS),
    ("attention", "if bias is None and «not scale > 0»:", "scale < 0", ATTENTION),
    ("attention", "padding = None if height % wh == 0 «and» width", "or", WINDOWS),
    ("rep_attention", "w_proj, b_proj, norm_eps=«inner_norm_eps»,", "None", ATTENTION),
    ("window_rep_attention", "pad_kv = b_qkv[«num_heads * d_qk» :]", "0", WINDOWS),
    ("quantize_rows", "inside = (k + tl.arange(0, BK) < «K»)[None, :]", "PADDED", INT8),
    ("quantize_rows", "wrong += tl.sum(tl.where(inside, «v * 0.0», 0.0), 1)", "0.0", INT8),
    ("quantize_rows", "finite = (wrong == 0.0) & («span <= LARGEST»)", "wrong == 0.0", INT8),
    ("quantize_rows", "used = finite & («span >= LEAST_SPAN»)", "span >= 0.0", INT8),
    ("quantize_rows", "steps = 127.0 if WEIGHTS else «255.0»", "254.0", INT8),
    ("quantize_rows", "tl.where(finite, 0.0, «float(\"nan\")»))", "0.0", INT8),
    ("quantize_rows", "numbers = tl.where((col < K)[None, :], «numbers - 128», 0)", "numbers - 127", INT8),
    ("quantize_rows", "numbers = «tl.where((col < K)[None, :], numbers - 128, 0)»", "numbers - 128", INT8),
    ("quantize_rows", "tl.where(finite, «least», 0.0)", "0.0", INT8),
    ("int8", "whole = (total + «128 * sums»)", "127 * sums", INT8),
    ("int8", "(whole * s + o * «sums.to(tl.float32)»)", "1.0", INT8),
    ("int8", "whole_sums(x2, w2, «K2», row0", "K", INT8),
    ("int8", "BM, BN, BK, «EVEN2», TMA", "EVEN", INT8),
    ("int8", "residual, residual_stride, out, N, row0, M, col0, N, BM, BN, «ACTIVATION»", "\"none\"", INT8),
    ("partial_gelu_ffn", "merged = None if «w_merged is None» else (z,", "True", INT8),
)  # fmt: skip


def mutated(text: str, place: str, mutant: str) -> str:
    """A file's text with one mutant."""
    before, rest = place.split("«")
    original, after = rest.split("»")
    whole = before + original + after
    if text.count(whole) != 1:
        sys.exit(f"found {text.count(whole)} times: {place}")
    return text.replace(whole, before + mutant + after)


def killed(copy: Path, tests: str) -> bool:
    """Whether the tests fail in the copy, or do not end."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", tests]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=SECONDS).returncode != 0
    except subprocess.TimeoutExpired:
        return True


def main() -> None:
    """Run all or the given mutants, print the survivors; exit code 1 if there are any."""
    chosen = [int(number) for number in sys.argv[1:]] or range(1, len(MUTANTS) + 1)
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("repavit_ops", "kernels", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / "repavit_ops/kernels").symlink_to("../kernels")  # found before the installed one
        for number in chosen:
            name, place, mutant, tests = MUTANTS[number - 1]
            path = copy / f"kernels/{name}.py"
            original = path.read_text()
            path.write_text(mutated(original, place, mutant))
            line = f"{number:3} {name}: {place}  →  {mutant}"
            dead = killed(copy, tests)
            print(f"{'killed  ' if dead else 'SURVIVED'} {line}", flush=True)
            survivors += [] if dead else [line]
            path.write_text(original)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
