// What lets a library built with gcc 11 or later run beside the libstdc++ and glibc of 2018 (manylinux_2_28): symbols that
// newer headers refer to, and older libraries lack, stand in the library itself. cpu/isa_scalar.cpp has the others.
#include <new>

#if defined(__gnu_linux__)

namespace std {
[[noreturn]] __attribute__((visibility("hidden"))) void __throw_bad_array_new_length();  // GLIBCXX_3.4.29
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

// GLIBC_2.32; std::shared_ptr counts with atomics where it is 0.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

#endif
