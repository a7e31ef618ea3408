#!/usr/bin/env bash
# Triton's compiled kernels do not survive moving the folder that caches them.
#
# Guess: an entry is found by its key, so a cache filled on one machine can travel to another and be found there.
# Seen (triton 3.6.0 and 3.9.0): the key is the same, but the entry's list of files, __grp__NAME.json, holds absolute
# paths; where those do not exist the kernel is compiled again. With the paths written anew it is found.
#
#   triton 3.6.0: compiled, then found, moved: compiled, paths written anew: found
#   triton 3.9.0: compiled, then found, moved: compiled, paths written anew: found
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/kernel.py" <<'PY'
import triton
import triton.language as tl


@triton.jit
def double(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, 2 * tl.load(x + at))
PY
cat >"$folder/probe.py" <<'PY'
import os
import time
from pathlib import Path

import triton
from kernel import double
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

source = ASTSource(fn=double, signature={"x": "*fp32", "y": "*fp32", "N": "constexpr"}, constexprs={(2,): 128})


def written() -> dict[str, int]:
    """Every file of the cache and when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")}


before = written()
time.sleep(0.02)
triton.compile(source, target=GPUTarget("cuda", 90, 32))
print("found" if written() == before else "compiled")
PY
cat >"$folder/relocate.py" <<'PY'
import json
import sys
from pathlib import Path

for path in Path(sys.argv[1]).rglob("__grp__*"):
    names = json.loads(path.read_text())["child_paths"]
    path.write_text(json.dumps({"child_paths": {name: str(path.with_name(name)) for name in names}}))
PY
for version in 3.6.0 3.9.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q --disable-pip-version-check --no-deps "triton==$version" 2>/dev/null
    probe() { TRITON_CACHE_DIR="$1" "$folder/$version/bin/python" "$folder/probe.py" 2>/dev/null; }
    first=$(probe "$folder/a-$version")
    second=$(probe "$folder/a-$version")
    mv "$folder/a-$version" "$folder/b-$version"
    cp -r "$folder/b-$version" "$folder/c-$version"
    moved=$(probe "$folder/b-$version")
    "$folder/$version/bin/python" "$folder/relocate.py" "$folder/c-$version"
    relocated=$(probe "$folder/c-$version")
    echo "triton $version: $first, then $second, moved: $moved, paths written anew: $relocated"
    [ "$first $second $moved $relocated" = "compiled found compiled found" ] || { echo "behaviour changed"; exit 1; }
done
