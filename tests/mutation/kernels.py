"""Mutants of the C++ kernels, chosen by hand:  python tests/mutation/kernels.py [NUMBER ...]

All of them are compiled into one driver (csrc/tests), each as ``(chosen == number ? mutant : original)``, and it runs
once per mutant, at the portable level. What it lets pass is listed; docs/reliability.md says why each may.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # for one run; a mutant that loops is killed too

# (file, the place with «what is replaced», what replaces it)
MUTANTS = (
    ("windows", "((«g.map[d] + g.window[d] - 1») / g.window[d])", "g.map[d]"),
    ("windows", "grid.shift[0] > 0 && «w / count[1] == count[0] - 1»", "w / count[1] == count[0]"),
    ("windows", "grid.shift[1] > 0 && «w % count[1] == count[1] - 1»", "w % count[1] == 0"),
    ("windows", "return «2 * vertical + horizontal»;", "vertical + 2 * horizontal"),
    ("windows", "«y < 0 || x < 0» ? kPaddedToken", "y < 0"),
    ("windows", "«(image * height + y) * width + x»", "(image * height + x) * width + y"),
    ("windows", "return «x >= cut_x»;", "x > cut_x"),
    ("windows", "return «y >= cut_y»;", "y > cut_y"),
    ("windows", "if («p >= period»)", "p > period"),
    ("windows", "while («from >= period»)", "from > period"),
    ("windows", "return «from < extent» ?", "from < extent - 1"),
    ("windows", "«grid.roll_first» ? extent", "!grid.roll_first"),
    ("windows", "«window_class & 2» ? height", "window_class & 1"),
    ("windows", "apart ? «static_cast<A>(kShiftMask)» :", "A{0}"),
    ("windows", "head * tokens * «tokens»;", "(tokens - 1)"),
    ("attend", "taken = «most == masked ? S::zero() : most»;", "most"),
    ("attend", "if (!fresh) most = «S::max(before, most)»;", "most"),
    ("attend", "S::fma(«S::load(s.sum + r)», S::load(s.factor + r), sum)", "S::zero()"),
    ("attend", "+ «key * bias.column_stride»;", "key"),
    ("attend", "keys, unit, «key == 0», with_odd);", "true"),
    ("attend", "apart = («before - taken») * factor", "taken - before"),
    ("attend", "if («mask == nullptr») {\n      return store", "true"),
    ("attend", "rows != nullptr ? «rows + i * row_stride» :", "rows"),
    ("attend", "mask != nullptr ? «mask + i * table_stride» :", "mask"),
    ("attend", "S::store(s.factor + r, «sum == S::zero()» ? S::zero()", "sum != sum"),
    ("attend", "const ptrdiff_t first = «rows * t / tiles»,", "(t > 0 ? rows * t / tiles + 1 : 0)"),
    ("attend", "head.values + «key * kPanelColumns»,", "ptrdiff_t{0}"),
    ("softmax", "return «E{kLeastProduct} <= product» && product", "true"),
    ("softmax", "S::fma(score, scale, «shift»)", "S::zero()"),
    ("attention_plan", "«j < length» ? 0 : kMasked<A>", "true"),
    ("attention_plan", "return «item * heads / layout.heads»;", "item * heads / layout.heads * 0"),
    ("attention_plan", "!(«static_cast<A>(args.scale * kLog2EExact) > 0»); }", "true"),
    ("layernorm", "«squares * share - offset * offset»", "(squares * share)"),
    ("layernorm", "static_cast<E>(«-row.offset * factor»)", "0.0"),
    ("layernorm", "__builtin_sqrt(«row.variance + eps»)", "(row.variance)"),
    ("layernorm", "if («!(row.variance <= __DBL_MAX__ / 4)»)", "false"),
    ("layernorm", "first + S::broadcast(static_cast<E>(«total * share»))", "0.0"),
    ("ffn_rows", "«layout.has_merged ? 2 : 1»", "1"),
    ("ffn_rows", "«args.residual» ? x + row", "false"),
    ("ffn_rows", "if (n >= S::kLanes) return S::load(«bias + col»);", "bias"),
    ("ffn_pack", "w = «c / kRun % 2 == 0» ? w_in", "c / kRun % 2 != 0"),
    ("gated_ffn", "const ptrdiff_t at = «(col + i * S::kLanes) / 2»;", "(col / 2)"),
    ("gated_ffn", "r = 0; «args.inner_norm» && r < rows", "false"),
    ("gated_ffn", "up += load_bias(b_up, «at», n);", "ptrdiff_t{0}"),
    ("gated_ffn", "«left < S::kLanes» ? static_cast<int>(left)", "false"),
    ("query_key_rows", "if (args.cos == nullptr || «token < 0») return;", "token < 1"),
    ("query_key_rows", "(first + r) % length - «prefix»;", "ptrdiff_t{0}"),
    ("query_key_rows", "+ «head * strides[1]» +", "ptrdiff_t{0}"),
    ("query_key_rows", "if («args.interleaved») return rotate", "!args.interleaved"),
    ("query_key_rows", "load_some<S>(sin + «half + i», n)", "i"),
    ("query_key_rows", "alternating[i] = «i % 2 == 0» ? -1 : 1", "i % 2 != 0"),
    ("query_key_rows", "if («args.norm == kLayerNorm») {", "true"),
    ("layernorm", "__builtin_sqrt(«mean_square(x, columns) + eps»)", "(mean_square(x, columns))"),
    (
        "ffn_rows",
        "«static_cast<ptrdiff_t>(args.rows) * block / blocks»",
        "(static_cast<ptrdiff_t>(args.rows) / blocks * block)",
    ),
    ("bias_residual", "v += S::load(bias + col + at, «n»);", "(n > 1 ? n - 1 : n)"),
    ("bias_residual", "const T* shortcut = residual + «row * residual_stride» + col;", "row * y_stride"),
    ("pooled_head", "(image * args.tokens + «args.first») * channels", "0"),
    ("pooled_head", "A{1} / «static_cast<A>(args.count)»", "A{1}"),
    ("pooled_head", "static_cast<const T*>(args.bias) + «n + o»)", "n"),
    ("pooled_head", "store_some<S>(mean + i, «args.normalize» ?", "false"),
    ("patch_projection", "plane * «args.strides[3]» +", "args.strides[4]"),
    ("patch_projection", "if («args.normalize») layer_norm_row(z, z", "false"),
    ("patch_projection", "down = row / args.grid[1] % «args.grid[0]»;", "args.grid[1]"),
    ("token_embedding", "T* const y = static_cast<T*>(args.patches.y) + «image * tokens» * channels;", "image"),
    ("token_embedding", "if («first == 0») {", "false"),
    ("token_embedding", "first - «image * patches»,", "0"),
    ("token_embedding", "«position != nullptr» ? position + at", "false"),
    ("pack", "const ptrdiff_t known = «end < depth ? end : depth»;", "(end < depth ? end : depth - 1)"),
    ("gemm_int8", "F::fma(«offset», sum[v], I::to_float", "F::zero()"),
    ("gemm_int8", "? F::fma(value, «scale[v]», F::load(before", "scale[0]"),
    ("gemm_int8", "«before != nullptr» ? F::fma(value", "false"),
    ("gemm_int8", "offset += «int8_panel_bytes(depth)»;", "int8_panel_bytes(0)"),
    ("gemm_int8", "place.first ? «I::zero()» : I::load", "I::broadcast(1)"),
    ("gemm_int8", "sizeof(Int8Columns) + «done * kPanelColumns» + first", "done"),
    ("gemm_int8", "low = quads << («24 - 8 * kFirst») >> 24", "(16 - 8 * kFirst)"),
    ("gemm_int8", "place{k == 0, «k + part.depth == depth»,", "true"),
    ("quantize_rows", "«constant» ? row.least : 0.0f", "false"),
    ("quantize_rows", "out + i, «(v - from)» * by", "v"),
    ("quantize_rows", "return {«range / 255.0f», row.least};", "(range / 254.0f)"),
    ("pack", "*sum += «q»;", "0"),
    ("pack", "*scale = used ? «most / 127.0f» :", "(most / 128.0f)"),
    ("ffn_rows_int8", "«layout.has_merged ? 2 : 1»", "1"),
    ("ffn_rows_int8", "«args.residual» ? x : nullptr", "false"),
    ("attention_rows", "k < channels && «x == nullptr»;", "false"),
    ("attend", "if (with_odd) most = S::max(«S::load(s.odd + r)», most);", "most"),
    ("attend", "«score * scale» + table[r * table_stride]", "score"),
    ("attend", "if («mask != nullptr») score += mask", "false"),
    ("attend", "s.sum[r] += «s.odd[r]»;", "A{0}"),
    ("attend", "s.weight_stride + «keys»;", "0"),
    ("attend", "head.has_odd() && «key + keys == columns»;", "true"),
    ("attend", "all_keys = «keys + with_odd»;", "keys"),
    ("attend", "widen_bias_row(from, bias.column_stride, «all_keys», s.bias", "keys"),
    ("attend", "Rows<E> weights{s.weights, s.weight_stride, «all_keys»}", "keys"),
    ("attend", "const int n = «static_cast<int>(depth - k)») sum", "0"),
    ("pack_keys", "begin < end && «end == head.tokens») copy", "true"),
    ("exp", "f = x - («shifted - magic»);", "shifted - magic - S::broadcast(1.0f)"),
    ("ffn_rows", "bias != nullptr ? «bias + col» : nullptr", "bias"),
    ("ffn_rows", "first = total * item / items, last = «total * (item + 1) / items»;", "total * item / items + 1"),
    ("partial_gelu_ffn", "if (b_in != nullptr) b_in += «first»;", "0"),
    ("gated_ffn", "if (b_up != nullptr) b_up += «first»;", "0"),
    ("attention_rows", "y.data += «col»;", "0"),
    ("attention_rows", "plan.args.residual ? «residual.data + col» : nullptr;", "residual.data"),
    ("attention_rows", "bias != nullptr ? «bias + col» : nullptr", "bias"),
    ("attention_rows", "panels = «whole_panels(layout.channels_out) / kPanelColumns»;", "layout.proj_panels"),
    ("rep_attention", "heads{part * each, «(part + 1) * each»}", "part * each"),
    ("rep_attention", "s.z = plan.z + «row» * plan.z_stride;", "0"),
    ("rep_attention", "s.o = plan.o + «row» * plan.o_stride;", "0"),
    ("rep_attention", "if («plan.args.inner_norm») run(", "false"),
    ("rep_attention", "end = «plan.length * (piece + 1) / pieces»;", "plan.length * piece / pieces"),
    ("attention_rows", "if («!plan.args.inner_norm || plan.int8_panels != nullptr») return;", "true"),
    ("attention_rows", "«plan.args.inner_norm» ? kLayerNorm : kNoNorm", "false"),
)


def mutated(copy: Path) -> list[str]:
    """Write every mutant into the copy's headers; returns one line each."""
    lines = []
    for number, (name, place, mutant) in enumerate(MUTANTS, 1):
        path = copy / f"csrc/cpu/{name}-inl.h"
        text = path.read_text()
        before, rest = place.split("«")
        original, after = rest.split("»")
        found = text.count(before + original + after)
        if found != 1:
            sys.exit(f"mutant {number}: found {found} times in {name}-inl.h: {place}")
        choice = f"(::repavit_mutant == {number} ? ({mutant}) : ({original}))"
        path.write_text(text.replace(before + original + after, before + choice + after))
        lines.append(f"{number:3} {name}: {original}  →  {mutant}")
    kernels = copy / "csrc/cpu/kernels.h"
    kernels.write_text(
        kernels.read_text().replace("#pragma once\n", "#pragma once\nextern volatile int repavit_mutant;\n", 1)
    )
    return lines


def build(copy: Path) -> Path:
    """The driver with the mutants at the portable level, and no other level."""
    source = copy / "csrc"
    (source / "mutant.cpp").write_text(
        "#include <stdlib.h>\nextern volatile int repavit_mutant;\n"
        'volatile int repavit_mutant = getenv("MUTANT") ? atoi(getenv("MUTANT")) : 0;\n'
    )
    flags = ["-std=c++17", "-O1", "-pthread", "-Wno-psabi", "-ffp-contract=fast"]
    levels = [line.split() for line in (source / "cpu/isa.flags").read_text().splitlines() if line and line[0] != "#"]
    runs = [
        subprocess.Popen(
            [
                *("g++", *flags),
                *(["-O0", *others] if level != "scalar" else []),
                *("-c", f"cpu/isa_{level}.cpp", "-o", f"isa_{level}.o"),
            ],
            cwd=source,
        )
        for level, *others in levels
    ]
    if any(run.wait() for run in runs):
        sys.exit("the mutants do not compile")
    objects = [f"isa_{level}.o" for level, *_ in levels]
    parts = ["tests/main.cpp", "cpu/dispatch.cpp", "cpu/arena.cpp", "mutant.cpp", *objects]
    subprocess.run(["g++", *flags, *parts, "-o", "driver"], cwd=source, check=True)
    return source / "driver"


def killed(driver: Path, number: int) -> bool:
    """Whether the driver fails with a mutant, or does not end."""
    try:
        run = subprocess.run(
            [driver, "scalar"], env=os.environ | {"MUTANT": str(number)}, capture_output=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return True
    return run.returncode != 0


def main() -> None:
    """Build, run all or the given mutants, print the survivors; exit code 1 if there are any."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "csrc", copy / "csrc")
        lines = mutated(copy)
        driver = build(copy)
        if killed(driver, 0):
            sys.exit("the driver fails without any mutant")
        chosen = [int(number) for number in sys.argv[1:]] or range(1, len(MUTANTS) + 1)
        survivors = [lines[number - 1] for number in chosen if not killed(driver, number)]
        print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed")
        print("\n".join(survivors))
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
