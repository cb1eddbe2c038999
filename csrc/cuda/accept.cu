// accept on a GPU: one thread a prompt. A round has few prompts and few columns, so one launch is all of its cost.
#include "kernels.h"

namespace stars {

// __grid_constant__: read where the launch put them, the arguments take no registers.
template <typename Reward>
__global__ void __launch_bounds__(kAcceptBlock)
    accept_kernel(const __grid_constant__ AcceptArgs<Reward> args, const int64_t prompts) {
  accept_thread(args, prompts, blockIdx.x, threadIdx.x);
}

template <typename Reward>
void launch_accept(const AcceptArgs<Reward>& args, int64_t prompts, cudaStream_t stream) {
  if (prompts == 0) return;  // CUDA refuses an empty grid
  accept_kernel<<<static_cast<unsigned>(accept_blocks(prompts)), kAcceptBlock, 0, stream>>>(args, prompts);
}

template void launch_accept(const AcceptArgs<float>&, int64_t, cudaStream_t);
template void launch_accept(const AcceptArgs<double>&, int64_t, cudaStream_t);

std::vector<int> cuda_archs() { return {__CUDA_ARCH_LIST__}; }

}  // namespace stars
