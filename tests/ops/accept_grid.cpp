// The CUDA grid of accept on the host, for test_accept_cuda.py: its threads run one by one, in the given order.
#include "accept.h"

namespace {

template <typename Reward>
void run(const stars::AcceptArgs<Reward>& args, int64_t prompts, const int64_t* threads, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    stars::accept_thread(args, prompts, threads[i] / stars::kAcceptBlock, threads[i] % stars::kAcceptBlock);
  }
}

}  // namespace

extern "C" {

int64_t accept_block() { return stars::kAcceptBlock; }
int64_t accept_blocks(int64_t prompts) { return stars::accept_blocks(prompts); }
int64_t accept_args_size() { return sizeof(stars::AcceptArgs<float>); }

void accept_grid_float32(const stars::AcceptArgs<float>* args, int64_t prompts, const int64_t* threads, int64_t count) {
  run(*args, prompts, threads, count);
}

void accept_grid_float64(const stars::AcceptArgs<double>* args, int64_t prompts, const int64_t* threads,
                         int64_t count) {
  run(*args, prompts, threads, count);
}

}  // extern "C"
