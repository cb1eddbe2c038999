#include "fork_attention.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#define STARS_KERNEL "fork_attention_kernel.h"
#include "check.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace stars {
namespace {

constexpr size_t kAlign = 64;  // a cache line: no load of a vector needs two

// Columns of the rows of one prompt, which share every read of its prefix, in blocks: small ones where there would be
// too few for the threads.
std::vector<ForkAttentionBlock> blocks_of(const std::vector<int64_t>& rows, const int64_t* prompt, int64_t per_row,
                                          int64_t kv_heads) {
  constexpr int64_t kLeast = 16, kBlocksPerThread = 4;
  const int64_t columns = static_cast<int64_t>(rows.size()) * per_row * kv_heads;
  const int64_t wanted = columns / (kBlocksPerThread * at::get_num_threads());
  const int64_t size = std::clamp((wanted + kLeast - 1) / kLeast * kLeast, kLeast, kBlockColumns);
  std::vector<ForkAttentionBlock> blocks;
  for (size_t begin = 0, end = 0; begin < rows.size(); begin = end) {
    const int64_t owner = prompt[rows[begin]];
    while (end < rows.size() && prompt[rows[end]] == owner) ++end;
    const int64_t all = static_cast<int64_t>(end - begin) * per_row;
    for (int64_t head = 0; head < kv_heads; ++head)
      for (int64_t first = 0; first < all; first += size)
        blocks.push_back({rows.data() + begin, owner, head, first, std::min(size, all - first)});
  }
  return blocks;
}

}  // namespace

at::Tensor fork_attention_cpu(const at::Tensor& query, const at::Tensor& suffix_key, const at::Tensor& suffix_value,
                              const at::Tensor& suffix_len, const at::Tensor& query_len, const at::Tensor& arena_key,
                              const at::Tensor& arena_value, const at::Tensor& offsets, const at::Tensor& lengths,
                              const at::Tensor& prompt, double scale, int64_t window, double softcap,
                              const std::optional<at::Tensor>& sinks) {
  TORCH_CHECK(query.dim() == 4, "query: expected shape [R, S, Hq, Dk], found ", query.sizes());
  TORCH_CHECK(suffix_value.dim() == 4, "suffix_value: expected shape [R, T, Hkv, Dv], found ", suffix_value.sizes());
  TORCH_CHECK(offsets.dim() == 1, "offsets: expected shape [P], found ", offsets.sizes());
  const auto dtype = query.scalar_type();
  const int64_t rows = query.size(0), steps = query.size(1), heads = query.size(2), key_size = query.size(3);
  const int64_t slots = suffix_value.size(1), kv_heads = suffix_value.size(2), value_size = suffix_value.size(3);
  const int64_t arena_slots = arena_key.dim() > 0 ? arena_key.size(0) : 0, prompts = offsets.size(0);
  TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "query: expected a multiple of ", kv_heads, " heads, found ", heads);
  check_tensor(suffix_key, "suffix_key", {rows, slots, kv_heads, key_size}, dtype);
  check_tensor(suffix_value, "suffix_value", {rows, slots, kv_heads, value_size}, dtype);
  check_tensor(arena_key, "arena_key", {arena_slots, kv_heads, key_size}, dtype);
  check_tensor(arena_value, "arena_value", {arena_slots, kv_heads, value_size}, dtype);
  check_tensor(suffix_len, "suffix_len", {rows}, at::kLong);
  check_tensor(query_len, "query_len", {rows}, at::kLong);
  check_tensor(prompt, "prompt", {rows}, at::kLong);
  check_tensor(offsets, "offsets", {prompts}, at::kLong);
  check_tensor(lengths, "lengths", {prompts}, at::kLong);
  if (sinks) check_shape(*sinks, "sinks", {heads});

  const auto query_d = dense_last(query), suffix_key_d = dense_last(suffix_key), arena_key_d = dense_last(arena_key);
  const auto suffix_value_d = dense_last(suffix_value), arena_value_d = dense_last(arena_value);
  const auto suffix_len_c = suffix_len.contiguous(), query_len_c = query_len.contiguous();
  const auto offsets_c = offsets.contiguous(), lengths_c = lengths.contiguous(), prompt_c = prompt.contiguous();
  const auto sinks_c = sinks ? sinks->to(at::kDouble).contiguous() : at::Tensor();
  const int64_t* const owner = prompt_c.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < rows; ++r) {  // a wrong number must not read another's memory
    const int64_t p = owner[r], used = suffix_len_c.const_data_ptr<int64_t>()[r];
    const int64_t asked = query_len_c.const_data_ptr<int64_t>()[r];
    TORCH_CHECK_INDEX(0 <= p && p < prompts, "prompt: expected 0 to ", prompts - 1, ", found ", p);
    TORCH_CHECK_INDEX(0 <= used && used <= slots, "suffix_len: expected 0 to ", slots, ", found ", used);
    TORCH_CHECK_INDEX(0 <= asked && asked <= std::min(steps, used), "query_len: expected 0 to ",
                      std::min(steps, used), ", found ", asked);
    const int64_t offset = offsets_c.const_data_ptr<int64_t>()[p], length = lengths_c.const_data_ptr<int64_t>()[p];
    TORCH_CHECK_INDEX(0 <= offset && 0 <= length && offset <= arena_slots - length, "prefix of prompt ", p,
                      ": expected slots of 0 to ", arena_slots, ", found ", offset, " + ", length);
  }

  auto out = at::empty({rows, steps, heads, value_size}, query.options());
  std::vector<int64_t> order(rows);  // prompt by prompt
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return owner[a] < owner[b]; });
  const auto blocks = blocks_of(order, owner, steps * (heads / kv_heads), kv_heads);
  const auto block_count = static_cast<int64_t>(blocks.size());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "stars::fork_attention", [&] {
    using sum_t = at::opmath_type<scalar_t>;
    const ForkAttentionArgs<scalar_t> args{
        .steps = steps,
        .kv_heads = kv_heads,
        .group = heads / kv_heads,
        .key_size = key_size,
        .value_size = value_size,
        .query = query_d.const_data_ptr<scalar_t>(),
        .query_row = query_d.stride(0),
        .query_step = query_d.stride(1),
        .query_head = query_d.stride(2),
        .suffix_key = suffix_key_d.const_data_ptr<scalar_t>(),
        .suffix_key_row = suffix_key_d.stride(0),
        .suffix_key_slot = suffix_key_d.stride(1),
        .suffix_key_head = suffix_key_d.stride(2),
        .suffix_value = suffix_value_d.const_data_ptr<scalar_t>(),
        .suffix_value_row = suffix_value_d.stride(0),
        .suffix_value_slot = suffix_value_d.stride(1),
        .suffix_value_head = suffix_value_d.stride(2),
        .arena_key = arena_key_d.const_data_ptr<scalar_t>(),
        .arena_key_slot = arena_key_d.stride(0),
        .arena_key_head = arena_key_d.stride(1),
        .arena_value = arena_value_d.const_data_ptr<scalar_t>(),
        .arena_value_slot = arena_value_d.stride(0),
        .arena_value_head = arena_value_d.stride(1),
        .suffix_len = suffix_len_c.const_data_ptr<int64_t>(),
        .query_len = query_len_c.const_data_ptr<int64_t>(),
        .offsets = offsets_c.const_data_ptr<int64_t>(),
        .lengths = lengths_c.const_data_ptr<int64_t>(),
        .scale = scale,
        .softcap = softcap,
        .window = window,
        .sinks = sinks ? sinks_c.const_data_ptr<double>() : nullptr,
        .out = out.mutable_data_ptr<scalar_t>(),
    };
    const auto attend = STARS_PICK(attend_block<scalar_t, sum_t>);
    const auto scratch_size = STARS_PICK(Scratch<sum_t>::size)(key_size, value_size);
    parallel_for(0, block_count, 1, [&](int64_t begin, int64_t end) {
      std::vector<sum_t> memory(scratch_size + kAlign / sizeof(sum_t));
      void* start = memory.data();
      size_t room = memory.size() * sizeof(sum_t);
      std::align(kAlign, scratch_size * sizeof(sum_t), start, room);
      for (int64_t b = begin; b < end; ++b) attend(args, blocks[b], static_cast<sum_t*>(start));
    });
  });
  return out;
}

}  // namespace stars
