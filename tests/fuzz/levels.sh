#!/usr/bin/env bash
# The long form of the fuzzers, at every CPU level that this machine has:  tests/fuzz/levels.sh PYTHON EXAMPLES LEVEL...
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$1 examples=$2
shift 2
ulimit -v 16000000  # KiB: what asks for more than any of these inputs can mean fails here and is no allocation elsewhere
for level in "$@"; do
  echo "REPAVIT_CPU_ISA=$level, $examples examples of each property"
  REPAVIT_CPU_ISA=$level REPAVIT_FUZZ=$examples "$python" -X faulthandler -m pytest -n 0 tests/test_fuzz_*.py
done
for target in checkpoints packed; do
  folder=$(mktemp -d)
  echo "atheris over $target"
  (cd "$folder" && "$python" "$OLDPWD/tests/fuzz/coverage_guided.py" "$target" "-runs=$((examples * 100))")
done
