// Compiles one kernel header for several instruction sets; the machine's is picked at run time, so that one build
// serves every x86-64. An op's .cpp does
//
//   #define STARS_KERNEL "<op>_kernel.h"
//   #include "isa.h"
//   ... STARS_PICK(function<T>)(arguments) ...
//
// The kernel header has no include guard and no #include, and puts its code into namespace stars::STARS_ISA. It calls
// nothing inline from outside that namespace: the linker keeps one copy of such a function, maybe that of a wider ISA.
#if !defined(__GNUC__) || defined(__clang__)
#error "the kernels of stars-kernels need gcc: its vectors and its target pragma"
#endif

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "isa_name.h"

#define STARS_INLINE inline __attribute__((always_inline))

#define STARS_ISA plain
#define STARS_VECTOR_BYTES 16
#include "simd.h"
#include STARS_KERNEL
#undef STARS_ISA
#undef STARS_VECTOR_BYTES

#if defined(__x86_64__)
#define STARS_PICK(...)                                               \
  (stars::isa() == stars::Isa::kAvx512 ? &stars::avx512::__VA_ARGS__  \
   : stars::isa() == stars::Isa::kAvx2 ? &stars::avx2::__VA_ARGS__    \
                                       : &stars::plain::__VA_ARGS__)

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define STARS_ISA avx2
#define STARS_VECTOR_BYTES 32
#include "simd.h"
#include STARS_KERNEL
#undef STARS_ISA
#undef STARS_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define STARS_ISA avx512
#define STARS_VECTOR_BYTES 64
#include "simd.h"
#include STARS_KERNEL
#undef STARS_ISA
#undef STARS_VECTOR_BYTES
#pragma GCC pop_options
#else
#define STARS_PICK(...) (&stars::plain::__VA_ARGS__)
#endif
