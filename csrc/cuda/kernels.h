// What the .cu files offer to C++: raw pointers in, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "../accept.h"

namespace stars {

// Queues the decisions of `prompts` prompts; whether that succeeded is in cudaGetLastError(). For float and double.
template <typename Reward>
void launch_accept(const AcceptArgs<Reward>& args, int64_t prompts, cudaStream_t stream);

// The architectures that nvcc was told to compile for, as __CUDA_ARCH__ has them: 900 is sm_90.
std::vector<int> cuda_archs();

}  // namespace stars
