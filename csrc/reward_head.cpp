#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#define STARS_KERNEL "reward_head_kernel.h"
#include "check.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace stars {

at::Tensor reward_head_cpu(const at::Tensor& hidden, const at::Tensor& last, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& norm_weight,
                           double eps) {
  TORCH_CHECK(hidden.dim() == 3, "hidden: expected shape [R, S, D], found ", hidden.sizes());
  const int64_t rows = hidden.size(0), steps = hidden.size(1), size = hidden.size(2);
  check_tensor(last, "last", {rows}, at::kLong);
  check_shape(weight, "weight", {size});
  if (bias) check_shape(*bias, "bias", {1});
  if (norm_weight) check_shape(*norm_weight, "norm_weight", {size});
  const auto sum_type = at::toOpMathType(hidden.scalar_type());
  const auto hidden_d = dense_last(hidden);
  const auto last_c = last.contiguous();
  const auto* const position = last_c.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < rows; ++r)
    TORCH_CHECK_INDEX(0 <= position[r] && position[r] < steps, "last: expected 0 to ", steps - 1, ", found ", position[r]);

  const auto weight_c = weight.to(sum_type).contiguous();
  const auto norm_c = norm_weight ? norm_weight->to(sum_type).contiguous() : at::Tensor();
  const double shift = bias ? bias->to(at::kDouble).item<double>() : 0;
  auto reward = at::empty({rows}, hidden.options().dtype(sum_type));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, hidden.scalar_type(), "stars::reward_head", [&] {
    using sum_t = at::opmath_type<scalar_t>;
    const auto sums = STARS_PICK(head_sums<scalar_t, sum_t>);
    const auto* const data = hidden_d.const_data_ptr<scalar_t>();
    const auto* const norm = norm_weight ? norm_c.const_data_ptr<sum_t>() : nullptr;
    auto* const out = reward.mutable_data_ptr<sum_t>();
    constexpr int64_t kGrain = 16384;  // elements worth a thread
    parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size)), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        sum_t squares, products;
        sums(data + r * hidden_d.stride(0) + position[r] * hidden_d.stride(1), weight_c.const_data_ptr<sum_t>(), norm, size,
             &squares, &products);
        const sum_t scale = norm_weight ? 1 / std::sqrt(squares / size + static_cast<sum_t>(eps)) : 1;
        out[r] = products * scale + static_cast<sum_t>(shift);
      }
    });
  });
  return reward;
}

}  // namespace stars
