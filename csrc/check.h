// One guard for every op's tensor arguments: says what was expected and what was found.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace stars {

inline void check_shape(const at::Tensor& tensor, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(tensor.sizes() == shape, name, ": expected shape ", shape, ", found ", tensor.sizes());
}

inline void check_tensor(const at::Tensor& tensor, const char* name, at::IntArrayRef shape,
                         at::ScalarType dtype) {
  check_shape(tensor, name, shape);
  TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected ", dtype, ", found ", tensor.scalar_type());
}

// The tensor itself where its last dimension is dense, else a contiguous copy.
inline at::Tensor dense_last(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

}  // namespace stars
