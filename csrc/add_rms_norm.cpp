#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#define STARS_KERNEL "rms_norm_kernel.h"
#include "check.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace stars {

std::tuple<at::Tensor, at::Tensor> add_rms_norm_cpu(const at::Tensor& x, const at::Tensor& residual,
                                                    const at::Tensor& weight, double eps) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, "x: expected shape [.., D], D > 0, found ", x.sizes());
  const int64_t size = x.size(-1), rows = x.numel() / size;
  check_tensor(residual, "residual", x.sizes(), x.scalar_type());
  check_shape(weight, "weight", {size});
  const auto x_c = x.contiguous(), residual_c = residual.contiguous();
  const auto weight_c = weight.to(at::toOpMathType(x.scalar_type())).contiguous();
  auto total = at::empty(x.sizes(), x.options()), normed = at::empty(x.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "stars::add_rms_norm", [&] {
    using sum_t = at::opmath_type<scalar_t>;
    const auto add = STARS_PICK(add_row<scalar_t>);
    const auto norm = STARS_PICK(rms_norm_row<scalar_t, sum_t>);
    const auto* const from = x_c.const_data_ptr<scalar_t>();
    const auto* const before = residual_c.const_data_ptr<scalar_t>();
    auto* const sum = total.mutable_data_ptr<scalar_t>();
    auto* const to = normed.mutable_data_ptr<scalar_t>();
    constexpr int64_t kGrain = 16384;  // elements worth a thread
    parallel_for(0, rows, std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin * size; at < end * size; at += size) {
        add(before + at, from + at, size, sum + at);
        norm(sum + at, weight_c.const_data_ptr<sum_t>(), size, static_cast<sum_t>(eps), to + at);
      }
    });
  });
  return {total, normed};
}

}  // namespace stars
