#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#define STARS_KERNEL "rotary_store_kernel.h"
#include "check.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace stars {

at::Tensor rotary_store_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& where,
                            const at::Tensor& keys, const at::Tensor& values) {
  TORCH_CHECK(query.dim() == 4 && query.size(3) % 2 == 0, "query: expected shape [B, S, Hq, D], D even, found ",
              query.sizes());
  const int64_t batch = query.size(0), steps = query.size(1), query_heads = query.size(2), size = query.size(3);
  TORCH_CHECK(value.dim() == 4 && keys.dim() == 4 && cos.dim() == 3, "value, keys, cos: expected 4, 4 and 3 dimensions");
  const int64_t heads = value.size(2), value_size = value.size(3), room = keys.size(1), phases = cos.size(0);
  const auto dtype = query.scalar_type();
  TORCH_CHECK(phases == 1 || phases == batch, "cos: expected shape [1 or ", batch, ", S, D], found ", cos.sizes());
  check_tensor(key, "key", {batch, steps, heads, size}, dtype);
  check_tensor(value, "value", {batch, steps, heads, value_size}, dtype);
  check_tensor(cos, "cos", {phases, steps, size}, dtype);
  check_tensor(sin, "sin", {phases, steps, size}, dtype);
  check_tensor(where, "where", {steps}, at::kLong);
  check_tensor(keys, "keys", {batch, room, heads, size}, dtype);
  check_tensor(values, "values", {batch, room, heads, value_size}, dtype);
  TORCH_CHECK(keys.is_contiguous() && values.is_contiguous(), "keys, values: expected them contiguous");
  const auto q = dense_last(query), k = dense_last(key), v = dense_last(value);
  const auto cos_c = cos.contiguous(), sin_c = sin.contiguous(), where_c = where.contiguous();
  const auto* const place = where_c.const_data_ptr<int64_t>();
  for (int64_t s = 0; s < steps; ++s)
    TORCH_CHECK_INDEX(place[s] >= 0 && place[s] < room, "where: expected 0 to ", room - 1, ", found ", place[s]);
  auto out = at::empty(query.sizes(), query.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "stars::rotary_store", [&] {
    const auto turn = STARS_PICK(turn_head<scalar_t>);
    const auto* const q_at = q.const_data_ptr<scalar_t>();
    const auto* const k_at = k.const_data_ptr<scalar_t>();
    const auto* const v_at = v.const_data_ptr<scalar_t>();
    const auto* const cos_at = cos_c.const_data_ptr<scalar_t>();
    const auto* const sin_at = sin_c.const_data_ptr<scalar_t>();
    auto* const keys_at = keys.mutable_data_ptr<scalar_t>();
    auto* const values_at = values.mutable_data_ptr<scalar_t>();
    auto* const out_at = out.mutable_data_ptr<scalar_t>();
    constexpr int64_t kGrain = 16384;  // elements worth a thread
    const int64_t elements = (query_heads + heads) * size + heads * value_size;
    parallel_for(0, batch * steps, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements)),
                 [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const int64_t b = token / steps, s = token % steps, phase = ((phases == 1 ? 0 : b) * steps + s) * size;
        const int64_t to = (b * room + place[s]) * heads;
        for (int64_t h = 0; h < query_heads; ++h)
          turn(q_at + b * q.stride(0) + s * q.stride(1) + h * q.stride(2), cos_at + phase, sin_at + phase, size / 2,
               out_at + (token * query_heads + h) * size);
        for (int64_t h = 0; h < heads; ++h) {
          turn(k_at + b * k.stride(0) + s * k.stride(1) + h * k.stride(2), cos_at + phase, sin_at + phase, size / 2,
               keys_at + (to + h) * size);
          std::memcpy(values_at + (to + h) * value_size, v_at + b * v.stride(0) + s * v.stride(1) + h * v.stride(2),
                      value_size * sizeof(scalar_t));
        }
      }
    });
  });
  return out;
}

}  // namespace stars
