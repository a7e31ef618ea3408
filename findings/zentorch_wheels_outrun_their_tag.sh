#!/usr/bin/env bash
# Wheels of one zentorch release need C++ libraries of different years, whatever their common tag says.
#
# Guess: all wheels that are tagged manylinux_2_28 load on systems of 2018 and later, whichever Python they are for: GCC 8's
# library has CXXABI_1.3.11, and the tag promises no more.
# Seen (zentorch 2.14.0.1, auditwheel 6.5.0): those for Python 3.10 and 3.11 do; those for 3.12 and 3.13 want
# CXXABI_1.3.15, which came with GCC 14, and so end at "import zentorch" on Debian 12 and Ubuntu 22.04. The release
# 2.13.0.2 is divided alike, and auditwheel calls its wheel for 3.12 manylinux_2_39; 2.13.0.0 was not.
#
#   zentorch 2.14.0.1, Python 3.10: CXXABI_1.3.11
#   zentorch 2.14.0.1, Python 3.11: CXXABI_1.3.11
#   zentorch 2.14.0.1, Python 3.12: CXXABI_1.3.15
#   zentorch 2.14.0.1, Python 3.13: CXXABI_1.3.15
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/probe.py" <<'PY'
import re
import subprocess
import sys
from pathlib import Path

found = {}
for version in ("2.14.0.1", "2.13.0.0"):
    for python in ("310", "311", "312", "313"):
        target = Path(sys.argv[1], version, python)
        wanted = ["--only-binary=:all:", "--python-version", python, "--platform", "manylinux_2_28_x86_64"]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *wanted, "-d", str(target)]
        subprocess.run([*command, f"zentorch=={version}"], check=True, stderr=subprocess.DEVNULL)
        wheel = next(target.glob("*.whl"))
        assert "manylinux_2_28" in wheel.name
        report = subprocess.run(
            [sys.executable, "-m", "auditwheel", "show", str(wheel)], check=True, capture_output=True, text=True
        ).stdout
        needs = max(re.findall(r"CXXABI_1\.3\.(\d+)", report), key=int)
        found[version, python] = int(needs)
        print(f"zentorch {version}, Python 3.{python[1:]}: CXXABI_1.3.{needs}")
assert all((needs > 11) == (key in {("2.14.0.1", "312"), ("2.14.0.1", "313")}) for key, needs in found.items())
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q auditwheel==6.5.0
"$folder/env/bin/python" "$folder/probe.py" "$folder"
