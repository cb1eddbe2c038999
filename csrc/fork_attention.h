// The arguments of fork_attention's kernels: raw pointers, strides in elements, last dimensions dense.
#pragma once

#include <cstdint>

namespace stars {

template <typename T>
struct ForkAttentionArgs {
  // R rows, S queries a row, Hq = kv_heads * group heads
  int64_t steps, kv_heads, group, key_size, value_size;
  const T* query;  // [R, S, Hq, Dk]
  int64_t query_row, query_step, query_head;
  const T* suffix_key;  // [R, T, Hkv, Dk]
  int64_t suffix_key_row, suffix_key_slot, suffix_key_head;
  const T* suffix_value;  // [R, T, Hkv, Dv]
  int64_t suffix_value_row, suffix_value_slot, suffix_value_head;
  const T* arena_key;  // [N, Hkv, Dk]
  int64_t arena_key_slot, arena_key_head;
  const T* arena_value;  // [N, Hkv, Dv]
  int64_t arena_value_slot, arena_value_head;
  const int64_t* suffix_len;  // [R]
  const int64_t* query_len;   // [R]
  const int64_t* offsets;     // [P]
  const int64_t* lengths;     // [P]
  double scale, softcap;
  int64_t window;
  const double* sinks;  // [Hq] or null
  T* out;               // [R, S, Hq, Dv], contiguous
};

// A block of columns, that is of (row, step, query head) triples with one prompt and one key/value head.
struct ForkAttentionBlock {
  const int64_t* rows;  // rows of the prompt
  int64_t prompt, kv_head;
  int64_t first, count;  // columns [first, first + count) of the rows' S * group each
};

constexpr int64_t kBlockColumns = 64;  // at most, in a block
constexpr int64_t kTileKeys = 64;      // keys whose softmax is taken at once

}  // namespace stars
