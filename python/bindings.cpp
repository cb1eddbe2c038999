// Where Python meets csrc: the module stars_kernels._C and the table of compiled ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <vector>

#include "accept.h"
#include "isa_name.h"
#include "ops.h"
#include "philox.h"

#ifdef STARS_WITH_CUDA
#include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif
#if defined(_OPENMP)
constexpr bool kOpenMp = true;
#else
constexpr bool kOpenMp = false;
#endif

// As TORCH_CUDA_ARCH_LIST has them: "9.0" is sm_90.
std::vector<std::string> cuda_archs() {
  std::vector<std::string> archs;
#ifdef STARS_WITH_CUDA
  for (const int arch : stars::cuda_archs()) {
    archs.push_back(std::to_string(arch / 100) + "." + std::to_string(arch / 10 % 10));
  }
#endif
  return archs;
}

py::dict build_info() {
  using namespace py::literals;
  const auto archs = cuda_archs();
  return py::dict("torch"_a = STARS_TORCH_VERSION, "compiler"_a = __VERSION__, "isa"_a = stars::isa_name(),
                  "openmp"_a = kOpenMp, "sanitized"_a = kSanitized, "cuda"_a = !archs.empty(), "cuda_archs"_a = archs);
}

std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  const auto bits = stars::philox4x32(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  return {bits.v[0], bits.v[1], bits.v[2], bits.v[3]};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace py::literals;
  m.def("build_info", &build_info);
  m.def("philox4x32", &philox4x32, "counter"_a, "key"_a);
  m.attr("OUTCOMES") = py::dict("retry"_a = int64_t{stars::kRetry}, "accepted"_a = int64_t{stars::kAccepted},
                                "fallback"_a = int64_t{stars::kFallback}, "nan"_a = int64_t{stars::kNan});
}

// The schemas are defined in Python, beside each op's definition, and exist without this file.
TORCH_LIBRARY_IMPL(stars, CPU, m) {
  m.impl("accept", &stars::accept_cpu);
  m.impl("add_rms_norm", &stars::add_rms_norm_cpu);
  m.impl("content_hash", &stars::content_hash_cpu);
  m.impl("fork_attention", &stars::fork_attention_cpu);
  m.impl("kv_commit", &stars::kv_commit_cpu);
  m.impl("packed_linear", &stars::packed_linear_cpu);
  m.impl("packed_swiglu", &stars::packed_swiglu_cpu);
  m.impl("reward_head", &stars::reward_head_cpu);
  m.impl("rms_norm", &stars::rms_norm_cpu);
  m.impl("rotary_store", &stars::rotary_store_cpu);
  m.impl("segment_sample", &stars::segment_sample_cpu);
}

#ifdef STARS_WITH_CUDA
TORCH_LIBRARY_IMPL(stars, CUDA, m) { m.impl("accept", &stars::accept_cuda); }
#endif
