// Which instruction set the kernels of isa.h use on this machine.
#pragma once

#include <ATen/Version.h>

#include <string>

namespace stars {

enum class Isa { kPlain, kAvx2, kAvx512 };

// What torch itself picked: ATEN_CPU_CAPABILITY=default|avx2|avx512 sets both.
inline Isa isa() {
#if defined(__x86_64__)
  static const Isa found = [] {
    const std::string name = at::get_cpu_capability();
    return name.rfind("AVX512", 0) == 0 ? Isa::kAvx512 : name == "AVX2" ? Isa::kAvx2 : Isa::kPlain;
  }();
  return found;
#else
  return Isa::kPlain;
#endif
}

inline const char* isa_name() {
  switch (isa()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
#if defined(__x86_64__)
      return "x86-64";
#elif defined(__aarch64__)
      return "aarch64";
#else
      return "generic";
#endif
  }
}

}  // namespace stars
