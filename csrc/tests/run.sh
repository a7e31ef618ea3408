#!/bin/sh
# Build and run the C++ driver:  csrc/tests/run.sh [plain|asan|tsan|aarch64] [thorough]
#
# aarch64 needs g++-aarch64-linux-gnu and qemu-user; without them it says so and succeeds.
set -eu
mode=${1:-plain}
cd "$(dirname "$0")/.."
out=../build/tests-$mode
mkdir -p "$out"

cxx=${CXX:-g++}
flags="-std=c++17 -g -Wall -Wextra -pthread"
levels="scalar avx2 avx512 avx512_bf16"
launch=
case $mode in
  plain) flags="$flags -O3" ;;
  asan) flags="$flags -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" ;;
  tsan) flags="$flags -O1 -fsanitize=thread" ;;
  aarch64)
    cxx=${AARCH64_CXX:-aarch64-linux-gnu-g++}
    if ! command -v "$cxx" >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
      echo "SKIPPED aarch64: needs g++-aarch64-linux-gnu and qemu-user"
      exit 0
    fi
    flags="$flags -O3 -static"
    levels=scalar
    launch=qemu-aarch64
    ;;
  *) echo "usage: $0 [plain|asan|tsan|aarch64] [thorough]" >&2; exit 2 ;;
esac
if [ "$mode" != aarch64 ] && [ "$(uname -m)" != x86_64 ]; then levels=scalar; fi

compile() {
  # shellcheck disable=SC2046,SC2086
  $cxx $flags $(sed -n "s/^$1  *//p" cpu/isa.flags) -c "cpu/isa_$1.cpp" -o "$out/isa_$1.o"
}
jobs=
for level in $levels; do
  compile "$level" &
  jobs="$jobs $!"
done
for job in $jobs; do wait "$job"; done
objects=$(for level in $levels; do echo "$out/isa_$level.o"; done)
# shellcheck disable=SC2086
$cxx $flags tests/main.cpp cpu/dispatch.cpp cpu/arena.cpp cpu/fused_blocks.cpp $objects -o "$out/driver"
shift $(( $# > 0 ? 1 : 0 ))
exec $launch "$out/driver" "$@"
