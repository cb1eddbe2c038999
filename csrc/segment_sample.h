// What segment_sample and its sweeps share.
#pragma once

#include <cstdint>

namespace stars {

constexpr int64_t kMaxBlock = 64;  // logits whose maximum is kept: finds the largest without sorting

// Where the noise of a token comes from (philox.h).
struct Draw {
  uint64_t key;
  uint32_t position, stream, attempt;
};

}  // namespace stars
