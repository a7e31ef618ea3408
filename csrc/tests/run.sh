#!/bin/sh
# Build and run the C++ driver:  csrc/tests/run.sh [plain|asan|tsan|aarch64|avx512|avx512-asan|avx_vnni] [thorough] [threads]
#
# avx_vnni runs the AVX2 level with its int8 products on 256-bit VNNI, emulated (emulated_vnni.h).
#
# aarch64 needs g++-aarch64-linux-gnu and qemu-user; avx512 and avx512-asan, which run the AVX-512 levels and AMX on a machine
# that has AVX2 alone (emulated_avx512.h, emulated_tile_unit.h), need SIMDe. Without them they say so and succeed.
set -eu
mode=${1:-plain}
cd "$(dirname "$0")/.."
out=../build/tests-$mode
mkdir -p "$out"

cxx=${CXX:-g++}
flags="-std=c++17 -g1 -Wall -Wextra -pthread"
checked="-Og -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
levels="scalar avx2 avx512 avx512_bf16 amx"
vnni=      # flag of dispatch.cpp where isa_avx2.cpp has its products of bytes emulated
emulated=  # levels whose instructions the compiler may not use
launch=
case $mode in
  plain) flags="$flags -O3" ;;
  asan) flags="$flags $checked" ;;
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
  avx512 | avx512-asan)
    if [ "$(uname -m)" != x86_64 ] || ! echo '#include <simde/x86/avx512.h>' | $cxx -E -x c++ - >/dev/null 2>&1; then
      echo "SKIPPED $mode: needs an x86-64 machine and SIMDe (libsimde-dev)"
      exit 0
    fi
    # -O1 and up unroll every tile into calls: more than ten minutes
    if [ "$mode" = avx512 ]; then flags="$flags -Og -Wno-psabi"; else flags="$flags -Wno-psabi $checked"; fi
    emulated="avx512 avx512_bf16 amx"
    ;;
  avx_vnni)
    flags="$flags -O1"
    levels="scalar avx2"
    vnni=-DREPAVIT_EMULATED_VNNI
    ;;
  *) echo "usage: $0 [plain|asan|tsan|aarch64|avx512|avx512-asan|avx_vnni] [thorough]" >&2; exit 2 ;;
esac
if [ "$mode" != aarch64 ] && [ "$(uname -m)" != x86_64 ]; then levels=scalar; fi

# Whether this machine runs a level. The driver has no others: they would be half of the time, and the library has them.
runs() {
  case $1 in
    scalar) true ;;
    avx2) grep -qs avx2 /proc/cpuinfo ;;
    avx512) grep -qs avx512f /proc/cpuinfo ;;
    avx512_bf16) grep -qs avx512_bf16 /proc/cpuinfo ;;
    amx) grep -qs amx_int8 /proc/cpuinfo ;;
  esac
}

if [ -z "$launch$emulated" ]; then
  mine=
  for level in $levels; do if runs "$level"; then mine="$mine $level"; fi; done
  levels=$mine
fi
built=0  # a bit for each level, as dispatch.cpp wants them
for level in $levels; do
  case $level in scalar) bit=1 ;; avx2) bit=2 ;; avx512) bit=4 ;; avx512_bf16) bit=8 ;; amx) bit=16 ;; esac
  built=$((built | bit))
done

compile() {
  machine=$1 extra=
  case " $emulated " in *" $1 "*) machine=avx2 extra="-include tests/emulated_avx512.h" ;; esac
  if [ -n "$emulated" ] && [ "$1" = amx ]; then extra="$extra -include tests/emulated_tile_unit.h"; fi
  if [ -n "$vnni" ] && [ "$1" = avx2 ]; then extra="-include tests/emulated_vnni.h"; fi
  # shellcheck disable=SC2046,SC2086
  $cxx $flags $(sed -n "s/^$machine  *//p" cpu/isa.flags) $extra -c "cpu/isa_$1.cpp" -o "$out/isa_$1.o"
}
jobs=
for level in $levels; do
  compile "$level" &
  jobs="$jobs $!"
done
for job in $jobs; do wait "$job"; done
objects=$(for level in $levels; do echo "$out/isa_$level.o"; done)
# shellcheck disable=SC2086
$cxx $flags $vnni -DREPAVIT_BUILT_LEVELS=$built -DREPAVIT_POISON_SCRATCH tests/main.cpp cpu/dispatch.cpp cpu/arena.cpp $objects -o "$out/driver"
shift $(( $# > 0 ? 1 : 0 ))
if [ -n "$launch$emulated" ]; then
  # shellcheck disable=SC2086
  exec $launch "$out/driver" $emulated "$@"
fi
jobs=
for level in $levels; do
  "$out/driver" "$level" "$@" &
  jobs="$jobs $!"
done
for job in $jobs; do wait "$job"; done
