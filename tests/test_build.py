"""What the installed package looks like, with and without its compiled library."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from repavit_ops import backends

ROOT = Path(__file__).resolve().parent.parent
METADATA = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
SOURCES = (*METADATA, "pytest_repavit_ops.py", "repavit_ops", "kernels", "csrc")
LIBRARY = ROOT / "repavit_ops/_C.so"


def copy_sources(to: Path) -> Path:
    """The tree that a build needs, without what earlier builds left in it."""
    to.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(source, to / name)
    return to


def build_wheel(sources: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v", "-w", "dist", "."]
    return subprocess.run(
        command, cwd=sources, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def pure(tmp_path_factory):
    """A source tree after a build without the C++ kernels."""
    sources = copy_sources(tmp_path_factory.mktemp("pure") / "src")
    done = build_wheel(sources, REPAVIT_BUILD_CPU="0")
    assert done.returncode == 0, done.stderr
    return sources


def test_kernels_install_inside_the_package(pure):
    (wheel,) = (pure / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        top_level = next(name for name in names if name.endswith("top_level.txt"))
        assert archive.read(top_level).decode().split() == ["pytest_repavit_ops", "repavit_ops"]
    packages = {name.rsplit("/", 1)[0] for name in names if name.endswith("/__init__.py")}
    for package in (ROOT / "repavit_ops").rglob("__init__.py"):
        assert package.parent.relative_to(ROOT).as_posix() in packages
    assert not any(name.startswith(("kernels/", "csrc/", "tests/", "bench/")) for name in names)
    for python in (ROOT / "kernels").glob("*.py"):
        assert f"repavit_ops/kernels/{python.name}" in names


def test_without_a_compiler_the_build_says_how_to_get_the_kernels(tmp_path):
    sources = copy_sources(tmp_path / "src")
    nothing = {"PATH": str(tmp_path), "CXX": ""}
    done = build_wheel(sources, **nothing, REPAVIT_BUILD_CPU="")
    assert done.returncode == 0, done.stderr
    (line,) = {line.strip() for line in (done.stdout + done.stderr).splitlines() if "without C++ kernels" in line}
    assert "no C++ compiler" in line
    assert "pip install -v --force-reinstall --no-deps ." in line
    (wheel,) = (sources / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")  # nothing compiled is in it
    done = build_wheel(sources, **nothing, REPAVIT_BUILD_CPU="1")
    assert done.returncode != 0
    assert "REPAVIT_BUILD_CPU=1, but no C++ compiler" in done.stdout + done.stderr


def test_a_source_distribution_holds_what_builds_and_what_tests(tmp_path):
    """pip builds it without the tree around it, without torch: nothing that a source includes may be missing."""
    command = [sys.executable, "-c", "import setuptools.build_meta as b; b.build_sdist('dist')"]
    sources = copy_sources(tmp_path / "src")
    for folder in ("tests", "docs", "bench", "examples"):
        shutil.copytree(ROOT / folder, sources / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for file in ("Makefile", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / file, sources / file)
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (archive,) = (sources / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
        packed.extractall(tmp_path / "unpacked", filter="data")
    tracked = [path.relative_to(sources) for path in sources.rglob("*") if path.is_file()]
    kept = {p.as_posix() for p in tracked if p.parts[0] != "dist" and "egg-info" not in p.as_posix()}
    assert kept - names == set()
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for source in (unpacked / "csrc").glob("*.cpp"):
        checked = subprocess.run(
            ["g++", "-std=c++17", "-fsyntax-only", source], capture_output=True, text=True, timeout=120
        )
        assert checked.returncode == 0, checked.stderr


def test_the_kernels_are_built_without_anything_of_torch():
    """So that an isolated build, which sees no torch, has them, and one binary serves every torch from 2.10 on."""
    for source in [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cpu").iterdir()]:
        assert not re.search(r"#include <(torch|ATen|c10)/", source.read_text()), source.name
    text = (ROOT / "setup.py").read_text()
    assert "import torch" not in text
    assert 'find_spec("torch")' not in text


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("built", [0b00011, 0b01101, 0b11011])
def test_levels_that_were_left_out_are_never_chosen(tmp_path, built):
    """REPAVIT_CPU_LEVELS builds some: the dispatcher takes the best of these up to what the processor has."""
    stubs = "".join(f"namespace {level} {{ void install(Kernels&) {{ }} }}\n" for level in backends.CPU_ISA)
    stubs += "namespace amx { bool self_check() { return true; } }"
    program = f"""
        #include "cpu/dispatch.h"
        #include <cstdio>
        #include <initializer_list>
        namespace repavit {{ {stubs} }}
        int main() {{
          for (const char* name : {{"scalar", "avx2", "avx512", "avx512_bf16", "amx"}})
            std::printf("%d ", repavit::lowered_level(name));
          std::printf("%d", repavit::supported_level());
        }}
    """
    (tmp_path / "main.cpp").write_text(program)
    command = ["g++", "-std=c++17", f"-DREPAVIT_BUILT_LEVELS={built}", "-I", ROOT / "csrc", "-o", tmp_path / "main"]
    subprocess.run([*command, tmp_path / "main.cpp", ROOT / "csrc/cpu/dispatch.cpp"], check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True)
    levels = [int(word) for word in done.stdout.split()]
    assert all(built >> level & 1 for level in levels)
    assert levels[0] == 0
    assert levels == [*sorted(levels[:-1]), levels[-2]]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("allowed", "right", "built", "wanted", "level", "refusal"),
    [
        ("true", "true", 31, "", 4, 0),
        ("false", "true", 31, "", 3, 1),
        ("true", "false", 31, "", 3, 2),
        ("true", "true", 15, "", 3, 3),
        ("true", "true", 15, "amx", 3, 3),
        ("true", "true", 15, "avx512", 2, 0),
    ],
    ids=["taken", "forbidden", "wrong", "not_built", "asked_for_and_not_built", "not_asked_for"],
)
def test_amx_is_taken_where_it_is_built_the_system_allows_it_and_a_product_comes_out_right(
    tmp_path, allowed, right, built, wanted, level, refusal
):
    stubs = "".join(f"namespace {name} {{ void install(Kernels&) {{ }} }}\n" for name in backends.CPU_ISA)
    stubs += f"namespace amx {{ bool self_check() {{ return {right}; }} }}"
    program = f"""
        #include "cpu/dispatch.h"
        #include <cstdio>
        namespace repavit {{ {stubs} }}
        int main() {{ std::printf("%d %d", repavit::isa_level(), repavit::amx_refusal()); }}
    """
    (tmp_path / "main.cpp").write_text(program)
    command = [
        "g++",
        "-std=c++17",
        f"-DREPAVIT_EMULATED_AMX={allowed}",
        f"-DREPAVIT_BUILT_LEVELS={built}",
        "-I",
        ROOT / "csrc",
        "-o",
        tmp_path / "main",
    ]
    subprocess.run([*command, tmp_path / "main.cpp", ROOT / "csrc/cpu/dispatch.cpp"], check=True)
    environment = {**os.environ, "REPAVIT_CPU_ISA": wanted}
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == f"{level} {refusal}"


def test_what_keeps_amx_away_is_a_warning(monkeypatch):
    if backends.why_unavailable("cpp") is not None:
        pytest.skip("the C++ kernels are not built")
    monkeypatch.setattr(torch.ops.repavit_ops, "amx_refusal", lambda: 1)
    with pytest.warns(UserWarning, match="does not let this process use AMX: bfloat16 runs at level avx512_bf16"):
        backends.cpu_isa()


def test_an_unknown_level_to_build_is_named(tmp_path):
    sources = copy_sources(tmp_path / "src")
    done = build_wheel(sources, REPAVIT_CPU_LEVELS="sse4")
    assert done.returncode != 0
    assert "REPAVIT_CPU_LEVELS: got sse4, wanted native or some of scalar, avx2" in done.stdout + done.stderr


@pytest.mark.skipif(not LIBRARY.exists() or shutil.which("objdump") is None, reason="needs the built library, objdump")
def test_the_library_runs_on_systems_of_2018():
    """manylinux_2_28: glibc 2.28 and the libstdc++ of gcc 8, whatever built it."""
    symbols = subprocess.run(["objdump", "-T", LIBRARY], capture_output=True, text=True, check=True).stdout
    for name, newest in (("GLIBC", (2, 28)), ("GLIBCXX", (3, 4, 25)), ("CXXABI", (1, 3, 11))):
        versions = {tuple(map(int, v.split("."))) for v in re.findall(rf"\b{name}_([0-9.]+)", symbols)}
        assert versions
        assert max(versions) <= newest, name


def test_an_installation_without_kernels_says_so_once_when_a_model_is_fused():
    """pip shows no line of a build; so the first fuse does, with the command."""
    program = (
        "import warnings, repavit_ops; from repavit_ops import backends; backends._cpp_failure = backends.REBUILD\n"
        "model = repavit_ops.create_model('vanilla_vit_tiny', img_size=32).eval()\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always'); repavit_ops.fuse(model); repavit_ops.fuse(model)\n"
        "print(*[w.message for w in seen], sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    (line,) = done.stdout.strip().splitlines()
    assert "runs in plain PyTorch" in line
    assert "pip install -v --force-reinstall --no-deps ." in line


def test_no_flag_ties_the_library_to_the_build_machine():
    text = (ROOT / "setup.py").read_text() + (ROOT / "csrc/cpu/isa.flags").read_text()
    for flag in ("-march=native", "-mtune=native", "-ffast-math", "-Ofast", "-fopenmp"):
        assert flag not in text


def test_every_level_has_its_source_and_flags():
    lines = (ROOT / "csrc/cpu/isa.flags").read_text().splitlines()
    levels = [line.split()[0] for line in lines if line and not line.startswith("#")]
    assert levels == list(backends.CPU_ISA)
    for level in levels:
        assert (ROOT / f"csrc/cpu/isa_{level}.cpp").exists()


def test_isa_sources_see_no_header_with_shared_inline_functions():
    """Such a function, compiled with -mavx512f, could be the copy that the linker keeps for every machine."""
    allowed = {"stddef.h", "stdint.h", "immintrin.h"}
    seen: set[Path] = set()
    queue = list((ROOT / "csrc/cpu").glob("isa_*.cpp"))
    while queue:
        file = queue.pop()
        if file in seen:
            continue
        seen.add(file)
        text = file.read_text()
        assert set(re.findall(r"#include <([^>]+)>", text)) <= allowed, file.name
        queue += [file.parent / name for name in re.findall(r'#include "([^"]+)"', text)]
    assert len(seen) > 10


def test_the_map_of_csrc_names_every_file():
    text = (ROOT / "csrc/README.md").read_text()
    for file in (ROOT / "csrc").rglob("*"):
        if file.parent.name == "cpu" and not file.name.startswith("isa_"):
            name = re.sub(r"(-inl)?\.(h|cpp)$", "", file.name)
            assert re.search(rf"\b{re.escape(name)}\b", text), file.name


@pytest.mark.skipif(not LIBRARY.exists() or shutil.which("nm") is None, reason="needs the built library and nm")
def test_the_library_has_no_python_symbols_and_no_machine_paths():
    symbols = subprocess.run(["nm", "-D", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True)
    assert not re.search(r"\b_?Py[A-Z_]", symbols.stdout)
    assert "GOMP" not in symbols.stdout
    strings = LIBRARY.read_bytes()
    assert str(ROOT).encode() not in strings
    assert str(Path.home()).encode() + b"/" not in strings


class Tile(NamedTuple):
    """A microkernel of the library, as its template arguments have it, and how many products its k loop holds."""

    level: str
    rows: int
    vectors: int
    dtype: str
    epilogue: str
    products: int  # of 4 groups of k; bf16 without vdpbf16ps takes two products a group


def k_loop(text: str, products: int, instructions: tuple[str, ...] = ("vfmadd", "vdpbf16ps")) -> list[str]:
    """Instructions of the shortest loop of one function's disassembly with exactly that many products."""
    lines = [(int(a, 16), i) for a, i in re.findall(r"^\s+([0-9a-f]+):\s+(.*)$", text, re.MULTILINE)]
    at = {address: index for index, (address, _) in enumerate(lines)}
    loops = []
    for index, (_, instruction) in enumerate(lines):
        jump = re.match(r"j(?!mp)\w+\s+([0-9a-f]+)", instruction)  # jmp: back from what the compiler moved out of line
        if jump and at.get(int(jump[1], 16), index) < index:
            body = [i for _, i in lines[at[int(jump[1], 16)] : index + 1]]
            if sum(i.removeprefix("{vex} ").startswith(instructions) for i in body) == products:
                loops.append(body)
    assert loops, f"no loop of {products} products in {text.splitlines()[0]}"
    return min(loops, key=len)


@pytest.fixture(scope="module")
def disassembly() -> list[str]:
    """The library, function by function."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", LIBRARY]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")


def require_level(disassembly: list[str], level: str) -> None:
    """Skip where the library was built without a level, as REPAVIT_CPU_LEVELS=native does."""
    if not any(f"repavit::{level}::install(" in function.split("\n", 1)[0] for function in disassembly):
        pytest.skip(f"the library was built without the level {level}")


@pytest.fixture(scope="module")
def k_loops(disassembly) -> list[tuple[Tile, list[str]]]:
    """The k loop, unrolled by 8 on AVX2 and by 4 above, of every tile of every height, dtype and epilogue."""
    name = re.compile(
        r"<.*\b(avx\w+)::run_(?:tile|chunk)<(\d+), (\d+), (?:repavit::)?(\w+),"
        r"(?: (?:repavit::)?\w+,)? repavit::\w+::(\w+)"  # a chunk names its panels' type too
    )
    loops = []
    for function in disassembly:
        if found := name.search(function.split("\n", 1)[0]):
            level, rows, vectors, dtype, epilogue = found.groups()
            unrolled = 8 if level == "avx2" else 4
            parts = 2 if (level, dtype) == ("avx512", "bf16") else 1
            tile = Tile(level, int(rows), int(vectors), dtype, epilogue, unrolled * int(rows) * int(vectors) * parts)
            loops.append((tile, k_loop(function, tile.products)))
    return loops


@pytest.mark.skipif(
    not LIBRARY.exists() or platform.machine() != "x86_64" or shutil.which("objdump") is None,
    reason="needs the library built for x86-64 and objdump",
)
@pytest.mark.parametrize(
    ("level", "height", "register"), [("avx2", 6, "ymm"), ("avx512", 14, "zmm"), ("avx512_bf16", 14, "zmm")]
)
def test_accumulators_stay_in_registers(disassembly, k_loops, level, height, register):
    """The k loop neither calls, spills nor moves its tile: gcc does so at a touch, at 3 times the time.

    A tile of bf16 in floats has even and odd k and a mask beside its 28 accumulators: gcc 12 keeps up to 13 of them in
    memory between two rounds of 8 products each, whose latency hides it.
    """
    require_level(disassembly, level)
    tiles = [(tile, loop) for tile, loop in k_loops if tile.level == level]
    assert {tile.rows for tile, _ in tiles} == set(range(1, height + 1))
    assert {"SumsToMemory", "BiasResidual", "QkvToScratch", "ScoresToScratch", "WeightedSum"} <= {
        tile.epilogue for tile, _ in tiles
    }
    for tile, loop in tiles:
        assert not [i for i in loop if i.startswith(("call", "vzeroupper"))], tile
        spills = [i for i in loop if register in i and re.search(r"%r[sb]p", i)]
        whole = tile.rows == height and tile.products == 8 * height
        assert len(spills) <= (4 if whole else tile.products // 4), (tile, spills)
        moves = [i for i in loop if re.match(rf"vmov\w+\s+%{register}\d+,%{register}", i)]
        few = tile.vectors == 1 and tile.rows < height  # the end of a matrix; such moves take no unit of the processor
        assert len(moves) <= (tile.products if few else tile.products // 2), (tile, moves)


@pytest.mark.skipif(
    not LIBRARY.exists() or platform.machine() != "x86_64" or shutil.which("objdump") is None,
    reason="needs the library built for x86-64 and objdump",
)
@pytest.mark.parametrize(
    ("level", "function", "instruction", "height", "unrolled", "register"),
    [
        ("avx2", "run_int8_chunk", "vpmaddwd", 6, 8, "ymm"),
        ("avx2", "run_int8_tile", "vpdpbusd", 6, 8, "ymm"),
        ("avx512", "run_int8_tile", "vpdpbusd", 14, 4, "zmm"),
        ("avx512_bf16", "run_int8_tile", "vpdpbusd", 14, 4, "zmm"),
    ],
)
def test_sums_of_int8_stay_in_registers(disassembly, level, function, instruction, height, unrolled, register):
    """As above: with the intrinsic gcc 12 took 28 to 44 accumulators through the stack per 48 to 56 products."""
    require_level(disassembly, level)
    name, heights = re.compile(rf"\b{level}::{function}<(\d+)>"), set()
    for text in disassembly:
        if found := name.search(text.split("\n", 1)[0]):
            rows = int(found[1])
            heights.add(rows)
            loop = k_loop(text, 2 * unrolled * rows, (instruction,))
            assert not [i for i in loop if i.startswith(("call", "vzeroupper"))], rows
            spills = [i for i in loop if register in i and re.search(r"%r[sb]p", i)]
            assert len(spills) <= (6 if rows == height else len(loop) // 8), (rows, spills)
    assert heights == set(range(1, height + 1))


def test_another_torch_gets_an_environment_of_its_own():
    """Else ``make test TORCH=…`` would test the torch that is there already."""

    def commands(*arguments: str) -> str:
        done = subprocess.run(["make", "-n", "-B", "lint", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout

    assert ".venv/bin/ruff check" in commands()
    other = commands("TORCH=torch==2.10.0")
    assert ".venv-torch-2.10.0/bin/ruff check" in other
    assert "install torch==2.10.0" in other
    assert ".venv/" not in other
