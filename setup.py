"""Builds the C++ CPU kernels beside the pure Python package, where a C++17 compiler and ninja are at hand.

All metadata is in pyproject.toml. Each instruction-set level is a source file with flags of its own, which setuptools
cannot express; so this file writes a small build.ninja. The library has no Python symbols and needs nothing of PyTorch
to be built: one wheel per platform, for every Python and for torch 2.10 and later.

    REPAVIT_BUILD_CPU=1         a build without the kernels is an error
    REPAVIT_BUILD_CPU=0         do not build them
    REPAVIT_CPU_LEVELS=native   only what this machine can run (half the time or less), or a list: avx2,avx512
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WANTED = os.environ.get("REPAVIT_BUILD_CPU", "")
FIX = "install a C++17 compiler (apt install g++) and run: pip install -v --force-reinstall --no-deps ."

LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")  # as csrc/cpu/dispatch.h counts them
X86 = sysconfig.get_platform().endswith(("x86_64", "amd64"))  # elsewhere only the portable level compiles

NINJA_RULES = """\
cxx = {cxx}
cflags = -std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -DNDEBUG -ffile-prefix-map={root}/= {extra}
rule compile
  description = compile $source
  command = $cxx $cflags $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule empty
  command = $cxx -shared -Wl,-soname,$out -x c++ /dev/null -o $out
rule link
  command = $cxx {shared} $in -o $out {libraries}
"""


class Unavailable(Exception):
    """Why the kernels cannot be built here, in one line."""


def compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise Unavailable("no C++ compiler (set CXX or install g++ or clang++)")


def ninja() -> str:
    if found := shutil.which("ninja"):
        return found
    if importlib.util.find_spec("ninja"):
        import ninja as package

        return str(Path(package.BIN_DIR) / "ninja")
    raise Unavailable("no ninja (pip install ninja)")


def isa_flags() -> dict[str, str]:
    """Level → compiler flags of its source file, from csrc/cpu/isa.flags, of the levels to build, lowest first."""
    lines = (ROOT / "csrc/cpu/isa.flags").read_text().splitlines()
    levels = dict(line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))
    if not X86:
        return {"scalar": levels["scalar"]}
    wanted = os.environ.get("REPAVIT_CPU_LEVELS", "")
    names = native_levels() if wanted == "native" else [name for name in wanted.split(",") if name]
    if unknown := sorted(set(names) - set(levels)):
        known = ", ".join(levels)
        raise SystemExit(f"REPAVIT_CPU_LEVELS: got {', '.join(unknown)}, wanted native or some of {known}")
    levels = {level: flags for level, flags in levels.items() if not names or level == "scalar" or level in names}
    if "amx" in levels and not assembles_amx():
        print("repavit_ops: the assembler does not know AMX (binutils 2.35 does): built without that level", flush=True)
        del levels["amx"]
    return levels


def assembles_amx() -> bool:
    command = [*compiler().split(), "-x", "assembler", "-c", "-o", os.devnull, "-"]
    return (
        subprocess.run(command, input="tdpbf16ps %tmm2, %tmm1, %tmm0\n", text=True, capture_output=True).returncode == 0
    )


def native_levels() -> list[str]:
    """The levels that this machine runs: its best, and those below of which it is a part."""
    try:
        flags = set(re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split())
    except (OSError, IndexError):
        raise SystemExit("REPAVIT_CPU_LEVELS: native needs /proc/cpuinfo; name the levels: avx2, avx512") from None
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
        narrow = ["avx512_bf16", *(["amx"] if {"amx_tile", "amx_bf16", "amx_int8"} <= flags else [])]
        return ["avx512", *(narrow if "avx512_bf16" in flags else [])]
    return ["avx2"] if {"avx2", "fma", "f16c"} <= flags else ["scalar"]


def write_ninja(build: Path) -> Path:
    """Write build.ninja; its result is build/_C.so.

    PyTorch's functions are declared by csrc/stable_abi.h and found when the library is loaded, so nothing of it is
    needed here: the library is linked against an empty one of the same name.
    """
    csrc = ROOT / "csrc"
    macos = sys.platform == "darwin"
    levels = isa_flags()
    built = sum(1 << LEVELS.index(level) for level in levels)
    flags = {csrc / f"cpu/isa_{level}.cpp": value for level, value in levels.items()}  # these first: they take minutes
    flags |= dict.fromkeys([*sorted(csrc.glob("bindings*.cpp")), csrc / "older_libraries.cpp"], "")
    flags |= {csrc / "cpu/dispatch.cpp": f"-DREPAVIT_BUILT_LEVELS={built}" if X86 else "", csrc / "cpu/arena.cpp": ""}

    rules = NINJA_RULES.format(
        cxx=compiler(),
        root=ROOT,
        extra=os.environ.get("CXXFLAGS", ""),
        shared="-bundle -undefined dynamic_lookup" if macos else "-shared",
        libraries="" if macos else "-Wl,--no-as-needed libtorch_cpu.so -Wl,--as-needed",
    )
    objects = {source: f"{source.stem}.o" for source in flags}
    edges = [
        f"build {objects[source]}: compile {source}\n  flags = {value}\n  source = {source.relative_to(ROOT)}"
        for source, value in flags.items()
    ]
    after = "" if macos else " | libtorch_cpu.so"
    edges.append(f"build _C.so: link {' '.join(objects.values())}{after}")
    edges += [] if macos else ["build libtorch_cpu.so: empty"]
    build.mkdir(parents=True, exist_ok=True)
    path = build / "build.ninja"
    path.write_text(rules + "\n".join(edges) + "\ndefault _C.so\n")
    return path


class BuildKernels(build_ext):
    """Compile csrc/ with ninja into repavit_ops/_C.so; without the means, leave a pure Python package and say so."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # no interpreter in the name: no Python symbols in the file

    def build_extension(self, ext: Extension) -> None:
        build = ROOT / "build" / f"cpu-{sysconfig.get_platform()}"
        try:
            write_ninja(build)
            progress = {**os.environ, "NINJA_STATUS": "repavit_ops [%f/%t, %e s] "}  # pip shows it with -v
            subprocess.run([ninja(), "-C", str(build)], check=True, stdout=sys.stderr, env=progress)
        except (Unavailable, subprocess.CalledProcessError) as error:
            if WANTED == "1":
                raise SystemExit(f"repavit_ops: REPAVIT_BUILD_CPU=1, but {error}; fix: {FIX}") from error
            self.warn(f"repavit_ops: installing without C++ kernels: {error}. To get them: {FIX}")
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / "_C.so", target)


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the library is tied to the platform, not to an interpreter; without it, py3-none-any."""

    def run(self) -> None:
        self.run_command("build")
        if not list(Path(self.get_finalized_command("build").build_lib).rglob("_C.so")):
            self.root_is_pure = True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform_tag = super().get_tag()
        return "py3", "none", "any" if self.root_is_pure else platform_tag


setup(
    packages=[*find_packages(include=["repavit_ops", "repavit_ops.*"]), "repavit_ops.kernels"],
    py_modules=["pytest_repavit_ops"],
    package_dir={"repavit_ops": "repavit_ops", "repavit_ops.kernels": "kernels"},
    package_data={"repavit_ops": ["py.typed"], "repavit_ops.kernels": ["tuned/*.json"]},
    ext_modules=[] if WANTED == "0" else [Extension("repavit_ops._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
