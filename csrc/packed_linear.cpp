#include "packed_linear.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#define STARS_KERNEL "packed_linear_kernel.h"
#include "check.h"
#include "isa.h"
#include "ops.h"

namespace stars {
namespace {

template <typename W>
void run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& y) {
  const PackedLinearArgs<W> args{
      .rows = x.size(0),
      .columns = y.size(1),
      .depth = x.size(1),
      .x = x.const_data_ptr<float>(),
      .x_row = x.stride(0),
      .weight = weight.const_data_ptr<W>(),
      .bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr,
      .y = y.mutable_data_ptr<float>(),
  };
  const auto kernel = STARS_PICK(packed_linear<W>);
  constexpr int64_t kGrain = 1 << 16;  // multiplications worth a thread
  const int64_t work = std::max<int64_t>(1, args.rows * args.depth * kPanel);
  at::parallel_for(0, weight.size(0), std::max<int64_t>(1, kGrain / work),
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

at::Tensor packed_linear_cpu(const at::Tensor& x, const at::Tensor& weight, int64_t columns,
                             const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(x.dim() >= 1, "x: expected shape [.., K], found ", x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat, "x: expected Float, found ", x.scalar_type());
  TORCH_CHECK(columns > 0, "columns: expected > 0, found ", columns);
  const int64_t depth = x.size(-1), panels = (columns + kPanel - 1) / kPanel;
  check_shape(weight, "weight", {panels, depth, kPanel});
  TORCH_CHECK(weight.is_contiguous(), "weight: expected a contiguous tensor, as pack_linear makes");
  if (bias) check_tensor(*bias, "bias", {columns}, at::kFloat);
  const auto flat = x.reshape({-1, depth});
  const auto x_d = depth <= 1 || flat.stride(1) == 1 ? flat : flat.contiguous();
  const auto bias_c = bias ? bias->contiguous() : at::Tensor();
  auto y = at::empty({x_d.size(0), columns}, x.options());
  if (weight.scalar_type() == at::kBFloat16) {
    run<at::BFloat16>(x_d, weight, bias_c, y);
  } else {
    TORCH_CHECK(weight.scalar_type() == at::kFloat, "weight: expected Float or BFloat16, found ", weight.scalar_type());
    run<float>(x_d, weight, bias_c, y);
  }
  auto shape = x.sizes().vec();
  shape.back() = columns;
  return y.view(shape);
}

}  // namespace stars
