#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <atomic>
#include <cstring>

#define STARS_KERNEL "content_hash_kernel.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace stars {

at::Tensor content_hash_cpu(const at::Tensor& x) {
  constexpr int64_t kWord = sizeof(uint64_t), kGrain = 1 << 16;  // words worth a thread
  const auto x_c = x.contiguous();
  const auto* const bytes = static_cast<const char*>(x_c.const_data_ptr());
  const int64_t size = static_cast<int64_t>(x_c.nbytes()), words = size / kWord;
  const auto hash_words = STARS_PICK(hash_words);
  std::atomic<uint64_t> total{0};  // a sum modulo 2^64 does not depend on its order
  parallel_for(0, words, kGrain, [&](int64_t begin, int64_t end) { total += hash_words(bytes, begin, end); });
  if (words * kWord < size) {  // the last word ends with zeros
    uint64_t last = 0;
    std::memcpy(&last, bytes + words * kWord, size - words * kWord);
    total += plain::mix(last + static_cast<uint64_t>(words + 1) * plain::kGolden);
  }
  auto hash = at::empty({}, x.options().dtype(at::kLong));
  *hash.mutable_data_ptr<int64_t>() = static_cast<int64_t>(total.load());
  return hash;
}

}  // namespace stars
