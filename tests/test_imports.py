"""The architecture as imports: every module imports only what lies below it, in no circle; importing stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "repavit_ops"

# from the bottom up; a module may import those of its own layer's package and of the layers below
LAYERS = (
    ("version",),
    ("reparam", "stack_plan", "backends"),
    ("cpu_tuning",),
    ("reference_int8",),
    ("reference",),
    ("kernels", "flop_formulas"),
    ("library",),
    ("ops",),
    ("nn",),
    ("stack",),
    ("models",),
    ("fusing",),
    ("checkpoints", "exporting"),
    ("verification", "cuda_graphs", "info", "moved"),
    ("testing",),
    ("idling", "predicting", "demo", "profiling", "benchmarking"),  # extras: the core never imports them
    ("cli",),
    ("__main__", "__init__"),
)
HEAVY = ("torch._dynamo", "triton", "timm", "transformers", "torchvision", "open_clip", "rich", "typer", "matplotlib")
HEAVY += ("PIL", "pyarrow", "ray")  # of extras


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below it; "" for the package itself."""
    found = {}
    for folder, prefix in ((ROOT / PACKAGE, ()), (ROOT / "kernels", ("kernels",))):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Modules of the package that one imports, at its top or in a function; imports for type checkers do not count."""
    path = MODULES[name]
    is_package = path.name == "__init__.py"
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted = [alias.name.split(".") for alias in node.names if alias.name.split(".")[0] == PACKAGE]
            yield from (".".join(parts[1:]) for parts in dotted)
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            here = name.split(".") if name else []
            up = node.level - is_package
            base = here[: len(here) - up]
        elif (node.module or "").split(".")[0] == PACKAGE:
            base = []
        else:
            continue
        target = [part for part in (node.module or "").split(".") if part and part != PACKAGE]
        for alias in node.names:
            inner = ".".join([*base, *target, alias.name])
            yield inner if inner in MODULES else ".".join([*base, *target])


def layer(name: str) -> int:
    top = name.split(".")[0] or "__init__"
    return next(i for i, tops in enumerate(LAYERS) if top in tops)


def test_the_walk_sees_the_package():
    assert len(MODULES) > 100
    assert {"nn.rep_attention", "kernels.attention", "fusing.families.timm", "cli.verify"} <= MODULES.keys()
    assert {"ops", "stack_plan"} <= set(imports("nn.rep_attention"))
    assert "kernels.tuning" in set(imports("info"))  # inside a function


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_down_the_layers(name):
    own = name.split(".")[0] or "__init__"
    for target in imports(name):
        top = target.split(".")[0] or "__init__"
        assert top == own or layer(target) < layer(name), f"{name or PACKAGE} imports {target or PACKAGE}"


def test_no_circle():
    graph = {name: {target for target in imports(name) if target != name} for name in MODULES}
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != 1, "circle: " + " → ".join((*path[path.index(name) :], name))
        if name in state:
            return
        state[name] = 1
        for target in graph[name]:
            visit(target, (*path, name))
        state[name] = 2

    for name in graph:
        visit(name, ())


def test_importing_loads_nothing_heavy():
    """Two of these double the time that importing PyTorch takes."""
    code = f"import sys, repavit_ops; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "[]"


def test_old_names_lead_to_the_new_places():
    code = (
        "from repavit_ops.nn import FusedStack; from repavit_ops.models import load_checkpoint, save_checkpoint;"
        "from repavit_ops.nn.fused_stack import FusedStack as pickled; import repavit_ops;"
        "assert pickled is FusedStack is repavit_ops.stack.FusedStack;"
        "assert load_checkpoint is repavit_ops.load_checkpoint"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_modules_that_pages_call_need_no_import_of_their_own():
    called = "testing.assert_equivalent exporting.export_model predicting.predict profiling.Profile idling.Fidelity"
    code = "; ".join(["import repavit_ops", *(f"repavit_ops.{name}" for name in called.split())])
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
