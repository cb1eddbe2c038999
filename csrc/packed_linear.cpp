#include "packed_linear.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#define STARS_KERNEL "packed_linear_kernel.h"
#include "check.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace stars {
namespace {

// x as [rows, K] with dense rows.
at::Tensor rows_of(const at::Tensor& x) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, "x: expected shape [.., K], K > 0, found ", x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat, "x: expected Float, found ", x.scalar_type());
  return dense_last(x.reshape({-1, x.size(-1)}));
}

void check_weight(const at::Tensor& weight, const char* name, int64_t columns, int64_t depth) {
  TORCH_CHECK(columns > 0, "columns: expected > 0, found ", columns);
  check_shape(weight, name, {(columns + kPanel - 1) / kPanel, depth, kPanel});
  TORCH_CHECK(weight.is_contiguous(), name, ": expected a contiguous tensor, as pack_linear makes");
  TORCH_CHECK(weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kBFloat16, name,
              ": expected Float or BFloat16, found ", weight.scalar_type());
}

template <typename W>
PackedLinearArgs<W> arguments(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                              const at::Tensor& y) {
  return {
      .rows = x.size(0),
      .columns = y.size(1),
      .depth = x.size(1),
      .x = x.const_data_ptr<float>(),
      .x_row = x.stride(0),
      .weight = weight.const_data_ptr<W>(),
      .bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr,
      .y = y.mutable_data_ptr<float>(),
      .y_row = y.size(1),
      .y_first = 0,
  };
}

template <typename Work>
void over_panels(const at::Tensor& x, const at::Tensor& weight, const Work& work) {
  constexpr int64_t kGrain = 1 << 16;  // multiplications worth a thread
  parallel_for(0, weight.size(0), std::max<int64_t>(1, kGrain / std::max<int64_t>(1, x.numel() * kPanel)), work);
}

// A function of the weights' type, called with a null pointer to it.
template <typename Work>
void by_type(const at::Tensor& weight, const Work& work) {
  if (weight.scalar_type() == at::kFloat) {
    work(static_cast<float*>(nullptr));
  } else {
    work(static_cast<at::BFloat16*>(nullptr));
  }
}

at::Tensor shaped_like(const at::Tensor& y, const at::Tensor& x) {
  auto shape = x.sizes().vec();
  shape.back() = y.size(1);
  return y.view(shape);
}

}  // namespace

at::Tensor packed_linear_cpu(const at::Tensor& x, const at::Tensor& weight, int64_t columns,
                             const std::optional<at::Tensor>& bias) {
  const auto rows = rows_of(x);
  check_weight(weight, "weight", columns, rows.size(1));
  if (bias) check_tensor(*bias, "bias", {columns}, at::kFloat);
  const auto bias_c = bias ? bias->contiguous() : at::Tensor();
  auto y = at::empty({rows.size(0), columns}, x.options());
  by_type(weight, [&](auto* type) {
    using W = std::remove_pointer_t<decltype(type)>;
    const auto args = arguments<W>(rows, weight, bias_c, y);
    const auto kernel = STARS_PICK(packed_linear<W>);
    over_panels(rows, weight, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
  return shaped_like(y, x);
}

at::Tensor packed_swiglu_cpu(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up, int64_t columns) {
  const auto rows = rows_of(x);
  check_weight(gate, "gate", columns, rows.size(1));
  check_weight(up, "up", columns, rows.size(1));
  TORCH_CHECK(gate.scalar_type() == up.scalar_type(), "up: expected ", gate.scalar_type(), ", found ",
              up.scalar_type());
  auto y = at::empty({rows.size(0), columns}, x.options());
  by_type(gate, [&](auto* type) {
    using W = std::remove_pointer_t<decltype(type)>;
    const auto gate_args = arguments<W>(rows, gate, at::Tensor(), y);
    const auto kernel = STARS_PICK(packed_swiglu<W>);
    over_panels(rows, gate, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(gate_args.rows * kPanelsAtOnce * kPanel);
      auto up_args = arguments<W>(rows, up, at::Tensor(), y);
      up_args.y = scratch.data();
      kernel(gate_args, up_args, begin, end);
    });
  });
  return shaped_like(y, x);
}

}  // namespace stars
