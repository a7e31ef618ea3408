"""Builds the C++ CPU kernels beside the pure Python package, where a compiler, ninja and torch's headers are at hand.

All metadata is in pyproject.toml. Each instruction-set level is a source file with flags of its own, which setuptools
cannot express; so this file writes a small build.ninja. The library has no Python symbols: one wheel per platform.

    REPAVIT_BUILD_CPU=1   a build without the kernels is an error
    REPAVIT_BUILD_CPU=0   do not build them
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
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
FIX = "pip install --no-build-isolation .  (after torch >= 2.10, with a C++17 compiler and ninja)"

X86 = platform.machine().lower() in ("x86_64", "amd64")  # elsewhere only the portable level compiles

NINJA_RULES = """\
cxx = {cxx}
cflags = -std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -DNDEBUG -ffile-prefix-map={root}/= {extra}
rule compile
  command = $cxx $cflags $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx {shared} $in -o $out {libraries}
"""


class Unavailable(Exception):
    """Why the kernels cannot be built here, in one line."""


def torch_directory() -> Path:
    """Installed torch with stable-ABI headers; found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unavailable("torch is not installed in the build environment")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        raise Unavailable(f"torch {version} is older than 2.10")
    return Path(spec.origin).parent


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
    """Level → compiler flags of its source file, from csrc/cpu/isa.flags."""
    lines = (ROOT / "csrc/cpu/isa.flags").read_text().splitlines()
    levels = dict(line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))
    return levels if X86 else {"scalar": levels["scalar"]}


def write_ninja(build: Path, torch: Path) -> Path:
    """Write build.ninja; its result is build/_C.so."""
    csrc = ROOT / "csrc"
    macos = sys.platform == "darwin"
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10 and later
    torch_flags = f"{target} -isystem {torch}/include -ffile-prefix-map={torch}/=torch/"
    flags = dict.fromkeys(sorted(csrc.glob("bindings*.cpp")), torch_flags)
    flags |= {csrc / f"cpu/{name}.cpp": "" for name in ("dispatch", "arena")}
    flags |= {csrc / f"cpu/isa_{level}.cpp": value for level, value in isa_flags().items()}

    rules = NINJA_RULES.format(
        cxx=compiler(),
        root=ROOT,
        extra=os.environ.get("CXXFLAGS", ""),
        shared="-bundle -undefined dynamic_lookup" if macos else "-shared -Wl,--as-needed",
        libraries=f"-L{torch}/lib -ltorch_cpu",
    )
    objects = {source: f"{source.stem}.o" for source in flags}
    edges = [f"build {objects[source]}: compile {source}\n  flags = {value}" for source, value in flags.items()]
    edges.append(f"build _C.so: link {' '.join(objects.values())}")
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
            write_ninja(build, torch_directory())
            subprocess.run([ninja(), "-C", str(build)], check=True, stdout=sys.stderr)
        except (Unavailable, subprocess.CalledProcessError) as error:
            if WANTED == "1":
                raise SystemExit(f"repavit_ops: REPAVIT_BUILD_CPU=1, but {error}; fix: {FIX}") from error
            self.warn(f"repavit_ops: installing without C++ kernels: {error}. To get them: {FIX}")
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / "_C.so", target)


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the library is tied to the platform, not to an interpreter."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


setup(
    packages=[*find_packages(include=["repavit_ops", "repavit_ops.*"]), "repavit_ops.kernels"],
    package_dir={"repavit_ops": "repavit_ops", "repavit_ops.kernels": "kernels"},
    package_data={"repavit_ops": ["py.typed"], "repavit_ops.kernels": ["tuned/*.json"]},
    ext_modules=[] if WANTED == "0" else [Extension("repavit_ops._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
