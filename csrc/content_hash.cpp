#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <atomic>
#include <cstring>

#include "ops.h"
#include "parallel.h"

namespace stars {
namespace {

// SplitMix64's finalizer: a bijection of 64-bit words.
inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

}  // namespace

at::Tensor content_hash_cpu(const at::Tensor& x) {
  constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
  constexpr int64_t kWord = sizeof(uint64_t), kGrain = 1 << 16;  // words worth a thread
  const auto x_c = x.contiguous();
  const auto* const bytes = static_cast<const char*>(x_c.const_data_ptr());
  const int64_t size = static_cast<int64_t>(x_c.nbytes()), words = (size + kWord - 1) / kWord;
  std::atomic<uint64_t> total{0};  // a sum modulo 2^64 does not depend on its order
  parallel_for(0, words, kGrain, [&](int64_t begin, int64_t end) {
    uint64_t sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      uint64_t word = 0;  // of the last, the bytes beyond the end are zero
      std::memcpy(&word, bytes + i * kWord, i * kWord + kWord <= size ? kWord : size - i * kWord);
      sum += mix(word + (static_cast<uint64_t>(i) + 1) * kGolden);
    }
    total += sum;
  });
  auto hash = at::empty({}, x.options().dtype(at::kLong));
  *hash.mutable_data_ptr<int64_t>() = static_cast<int64_t>(total.load());
  return hash;
}

}  // namespace stars
