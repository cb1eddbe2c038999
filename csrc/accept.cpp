#include "accept.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include "check.h"
#include "ops.h"

#ifdef STARS_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/kernels.h"
#endif

namespace stars {

namespace {

// All but the loop over prompts, for every device: run(AcceptArgs of the rewards' type, P) is that loop.
template <typename Run>
std::tuple<at::Tensor, at::Tensor> accept_with(const Run& run, const at::Tensor& rewards, const at::Tensor& valid,
                                               const at::Tensor& thresholds, double beta, bool hard,
                                               const at::Tensor& keys, const at::Tensor& position,
                                               const at::Tensor& first_attempt, int64_t max_attempts,
                                               const at::Tensor& best_reward, const at::Tensor& best_attempt) {
  TORCH_CHECK(rewards.dim() == 2, "rewards: expected shape [P, W], found ", rewards.sizes());
  TORCH_CHECK(rewards.scalar_type() == at::kFloat || rewards.scalar_type() == at::kDouble,
              "rewards: expected Float or Double, found ", rewards.scalar_type());
  const int64_t prompts = rewards.size(0), width = rewards.size(1);
  check_tensor(valid, "valid", {prompts, width}, at::kBool);
  check_tensor(thresholds, "thresholds", {prompts, width}, at::kDouble);
  check_tensor(keys, "keys", {prompts}, at::kLong);
  check_tensor(position, "position", {prompts}, at::kLong);
  check_tensor(first_attempt, "first_attempt", {prompts}, at::kLong);
  check_tensor(best_reward, "best_reward", {prompts}, at::kDouble);
  check_tensor(best_attempt, "best_attempt", {prompts}, at::kLong);
  for (const auto* tensor : {&valid, &thresholds, &keys, &position, &first_attempt, &best_reward, &best_attempt}) {
    TORCH_CHECK(tensor->device() == rewards.device(), "expected every tensor on ", rewards.device(),
                " as rewards is, found one on ", tensor->device());
  }
  TORCH_CHECK(hard || beta > 0, "beta: expected > 0 for soft acceptance, found ", beta);
  // An attempt number has 24 bits of a Philox counter.
  TORCH_CHECK(0 < max_attempts && max_attempts <= 1 << 24, "max_attempts: expected 1 .. 2^24, found ",
              max_attempts);

  const auto rewards_c = rewards.contiguous(), valid_c = valid.contiguous();
  const auto thresholds_c = thresholds.contiguous(), keys_c = keys.contiguous();
  const auto position_c = position.contiguous(), first_attempt_c = first_attempt.contiguous();
  auto chosen = at::empty({prompts}, keys.options()), outcome = at::empty({prompts}, keys.options());

  AT_DISPATCH_FLOATING_TYPES(rewards.scalar_type(), "stars::accept", [&] {
    const AcceptArgs<scalar_t> args{
        .rewards = rewards_c.const_data_ptr<scalar_t>(),
        .valid = valid_c.const_data_ptr<bool>(),
        .thresholds = thresholds_c.const_data_ptr<double>(),
        .keys = keys_c.const_data_ptr<int64_t>(),
        .position = position_c.const_data_ptr<int64_t>(),
        .first_attempt = first_attempt_c.const_data_ptr<int64_t>(),
        .width = width,
        .max_attempts = max_attempts,
        .beta = beta,
        .hard = hard,
        .best_reward = best_reward.mutable_data_ptr<double>(),
        .best_reward_stride = best_reward.stride(0),
        .best_attempt = best_attempt.mutable_data_ptr<int64_t>(),
        .best_attempt_stride = best_attempt.stride(0),
        .chosen = chosen.mutable_data_ptr<int64_t>(),
        .outcome = outcome.mutable_data_ptr<int64_t>(),
    };
    run(args, prompts);
  });
  return {chosen, outcome};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> accept_cpu(const at::Tensor& rewards, const at::Tensor& valid,
                                              const at::Tensor& thresholds, double beta, bool hard,
                                              const at::Tensor& keys, const at::Tensor& position,
                                              const at::Tensor& first_attempt, int64_t max_attempts,
                                              const at::Tensor& best_reward, const at::Tensor& best_attempt) {
  const auto run = [](const auto& args, int64_t prompts) {
    for (int64_t p = 0; p < prompts; ++p) accept_prompt(args, p);
  };
  return accept_with(run, rewards, valid, thresholds, beta, hard, keys, position, first_attempt, max_attempts,
                     best_reward, best_attempt);
}

#ifdef STARS_WITH_CUDA
std::tuple<at::Tensor, at::Tensor> accept_cuda(const at::Tensor& rewards, const at::Tensor& valid,
                                               const at::Tensor& thresholds, double beta, bool hard,
                                               const at::Tensor& keys, const at::Tensor& position,
                                               const at::Tensor& first_attempt, int64_t max_attempts,
                                               const at::Tensor& best_reward, const at::Tensor& best_attempt) {
  const c10::cuda::CUDAGuard on_device(rewards.device());
  const auto run = [](const auto& args, int64_t prompts) {
    launch_accept(args, prompts, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  return accept_with(run, rewards, valid, thresholds, beta, hard, keys, position, first_attempt, max_attempts,
                     best_reward, best_attempt);
}
#endif

}  // namespace stars
