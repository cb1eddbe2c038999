#include <ATen/core/Tensor.h>

#include <cstring>
#include <vector>

#include "check.h"
#include "ops.h"
#include "parallel.h"

namespace stars {

void kv_commit_cpu(const at::Tensor& suffix, const at::Tensor& arena, const at::Tensor& lengths,
                   const at::Tensor& offsets, const at::Tensor& prompt, const at::Tensor& row, const at::Tensor& count,
                   const at::Tensor& advance) {
  TORCH_CHECK(suffix.dim() == 6, "suffix: expected shape [L, 2, R, T, Hkv, D], found ", suffix.sizes());
  TORCH_CHECK(arena.dim() == 5, "arena: expected shape [L, 2, N, Hkv, D], found ", arena.sizes());
  const int64_t layers = suffix.size(0), rows = suffix.size(2), slots = suffix.size(3), heads = suffix.size(4);
  const int64_t size = suffix.size(5), arena_slots = arena.size(2), commits = prompt.numel(), prompts = lengths.numel();
  check_shape(suffix, "suffix", {layers, 2, rows, slots, heads, size});
  check_tensor(arena, "arena", {layers, 2, arena_slots, heads, size}, suffix.scalar_type());
  check_tensor(lengths, "lengths", {prompts}, at::kLong);
  check_tensor(offsets, "offsets", {prompts}, at::kLong);
  check_tensor(prompt, "prompt", {commits}, at::kLong);
  check_tensor(row, "row", {commits}, at::kLong);
  check_tensor(count, "count", {commits}, at::kLong);
  check_tensor(advance, "advance", {commits}, at::kBool);

  struct Copy {
    int64_t slot, row, count;
  };
  std::vector<Copy> copies;
  const auto prompt_c = prompt.contiguous(), row_c = row.contiguous(), count_c = count.contiguous();
  const auto offsets_c = offsets.contiguous(), advance_c = advance.contiguous();
  auto* const length = lengths.mutable_data_ptr<int64_t>();
  const int64_t length_stride = lengths.stride(0);
  for (int64_t i = 0; i < commits; ++i) {  // all of them before a byte is written
    const int64_t p = prompt_c.const_data_ptr<int64_t>()[i], r = row_c.const_data_ptr<int64_t>()[i];
    const int64_t n = count_c.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_INDEX(0 <= p && p < prompts, "prompt: expected 0 to ", prompts - 1, ", found ", p);
    TORCH_CHECK_INDEX(-1 <= r && r < rows, "row: expected -1 to ", rows - 1, ", found ", r);
    TORCH_CHECK_INDEX(0 <= n && n <= slots, "count: expected 0 to ", slots, ", found ", n);
    const int64_t offset = offsets_c.const_data_ptr<int64_t>()[p], filled = length[p * length_stride];
    TORCH_CHECK_INDEX(0 <= offset && offset <= arena_slots, "offsets: expected 0 to ", arena_slots, ", found ", offset);
    TORCH_CHECK_INDEX(0 <= filled && filled <= arena_slots, "lengths: expected 0 to ", arena_slots, ", found ", filled);
    const int64_t slot = offset + filled;
    TORCH_CHECK_INDEX(slot <= arena_slots - n, "prompt ", p, ": ", n, " tokens from slot ", slot,
                      " on do not fit an arena of ", arena_slots);
    if (r >= 0 && n > 0) copies.push_back({slot, r, n});
  }

  const int64_t token = heads * size;
  const auto dense = [&](const at::Tensor& t, int64_t slot_dim) {  // one slot's heads after the other's
    return (size <= 1 || t.stride(slot_dim + 2) == 1) && (heads <= 1 || t.stride(slot_dim + 1) == size) &&
           t.stride(slot_dim) == token;
  };
  if (dense(suffix, 3) && dense(arena, 2)) {
    const int64_t item = suffix.element_size(), moves = static_cast<int64_t>(copies.size());
    const auto* const from = static_cast<const char*>(suffix.const_data_ptr());
    auto* const to = static_cast<char*>(arena.mutable_data_ptr());
    constexpr int64_t kGrain = 8;  // copies worth a thread
    parallel_for(0, layers * 2 * moves, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t layer = i / (2 * moves), kv = i / moves % 2;
        const Copy& copy = copies[i % moves];
        const int64_t at = layer * arena.stride(0) + kv * arena.stride(1) + copy.slot * token;
        const int64_t source = layer * suffix.stride(0) + kv * suffix.stride(1) + copy.row * suffix.stride(2);
        std::memcpy(to + at * item, from + source * item, copy.count * token * item);
      }
    });
  } else {
    for (const Copy& copy : copies)
      arena.narrow(2, copy.slot, copy.count).copy_(suffix.select(2, copy.row).narrow(2, 0, copy.count));
  }
  for (int64_t i = 0; i < commits; ++i)
    if (advance_c.const_data_ptr<bool>()[i])
      length[prompt_c.const_data_ptr<int64_t>()[i] * length_stride] += count_c.const_data_ptr<int64_t>()[i];
}

}  // namespace stars
