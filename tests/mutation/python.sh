#!/usr/bin/env bash
# Mutants of the Python folds, index arithmetic and cache invalidation, by cosmic-ray:  tests/mutation/python.sh PYTHON [FILE]
#
# Works in a copy of the tree, which must have its kernels built. Survivors are printed as diffs; docs/reliability.md says
# of each why it is none, or which test came of it. What changes type annotations alone, or exchanges operators that no
# slip of the hand would (** for *, << for +), is left out.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:?a Python with the dev extra and cosmic-ray} only=${2:-}
copy=$(mktemp -d)
git ls-files -z | xargs -0 cp --parents -t "$copy"
cp repavit_ops/_C.so "$copy/repavit_ops/"
cd "$copy"

run() { # FILE TESTS...: all mutants of a file against some tests
  local file=$1
  shift
  [[ -z $only || $only == "$file" ]] || return 0
  cat > cosmic-ray.toml <<TOML
[cosmic-ray]
module-path = "$file"
timeout = 90.0
excluded-modules = []
test-command = "$python -m pytest -x -q -n 0 -p no:cacheprovider $*"
[cosmic-ray.distributor]
name = "local"
[cosmic-ray.filters.operators-filter]
exclude-operators = [
  "core/ReplaceBinaryOperator_BitOr_.*",
  "core/ReplaceBinaryOperator_.*_(Pow|LShift|RShift|BitXor|BitAnd|BitOr|FloorDiv)",
  "core/ReplaceComparisonOperator_(Is|IsNot|Eq|NotEq)_(Lt|LtE|Gt|GtE|Eq|NotEq)",
  "core/RemoveDecorator",
  "core/ExceptionReplacer",
]
TOML
  rm -f session.sqlite
  "$(dirname "$python")/cosmic-ray" init cosmic-ray.toml session.sqlite
  "$(dirname "$python")/cr-filter-operators" session.sqlite cosmic-ray.toml > /dev/null
  "$(dirname "$python")/cosmic-ray" exec cosmic-ray.toml session.sqlite
  echo "== $file"
  "$(dirname "$python")/cr-report" --surviving-only --show-diff session.sqlite
  "$(dirname "$python")/cr-rate" session.sqlite
}

run repavit_ops/reparam/affine.py tests/test_reparam_affine.py
run repavit_ops/reparam/ffn.py tests/test_reparam_ffn.py
run repavit_ops/reparam/attention.py tests/test_reparam_attention.py
run repavit_ops/stack/route.py tests/test_kept_plan.py tests/test_one_call.py tests/test_fused_blocks.py tests/test_timm_models.py
run repavit_ops/nn/window_rep_attention.py tests/test_window_module.py tests/test_nn.py tests/test_window_rep_attention.py
run repavit_ops/reparam/join.py tests/test_reparam_join.py
run repavit_ops/nn/join.py tests/test_join_coefficient.py tests/test_joined_merging.py tests/test_joined_training_form.py
run repavit_ops/nn/packed_weights.py tests/test_packed_copies.py tests/test_nn.py tests/test_dropped_weights.py tests/test_export.py \
  tests/test_fuzz_modules.py
