// The compiled ops: ATen in, ATen out. Schemas and definitions are in stars_kernels/ops/<op>.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace stars {

// accept.cpp: (chosen, outcome), both [P] int64; best_reward and best_attempt are written in place.
std::tuple<at::Tensor, at::Tensor> accept_cpu(const at::Tensor& rewards, const at::Tensor& valid,
                                              const at::Tensor& thresholds, double beta, bool hard,
                                              const at::Tensor& keys, const at::Tensor& position,
                                              const at::Tensor& first_attempt, int64_t max_attempts,
                                              const at::Tensor& best_reward, const at::Tensor& best_attempt);
// The same on the current CUDA stream; the host does not wait. In a build with CUDA.
std::tuple<at::Tensor, at::Tensor> accept_cuda(const at::Tensor& rewards, const at::Tensor& valid,
                                               const at::Tensor& thresholds, double beta, bool hard,
                                               const at::Tensor& keys, const at::Tensor& position,
                                               const at::Tensor& first_attempt, int64_t max_attempts,
                                               const at::Tensor& best_reward, const at::Tensor& best_attempt);

// add_rms_norm.cpp: (residual + x, its rms_norm), both the shape and dtype of x
std::tuple<at::Tensor, at::Tensor> add_rms_norm_cpu(const at::Tensor& x, const at::Tensor& residual,
                                                    const at::Tensor& weight, double eps);

// content_hash.cpp: a scalar int64
at::Tensor content_hash_cpu(const at::Tensor& x);

// fork_attention.cpp: [R, S, Hq, Dv]
at::Tensor fork_attention_cpu(const at::Tensor& query, const at::Tensor& suffix_key, const at::Tensor& suffix_value,
                              const at::Tensor& suffix_len, const at::Tensor& query_len, const at::Tensor& arena_key,
                              const at::Tensor& arena_value, const at::Tensor& offsets, const at::Tensor& lengths,
                              const at::Tensor& prompt, double scale, int64_t window, double softcap,
                              const std::optional<at::Tensor>& sinks);

// kv_commit.cpp: arena and lengths are written in place.
void kv_commit_cpu(const at::Tensor& suffix, const at::Tensor& arena, const at::Tensor& lengths,
                   const at::Tensor& offsets, const at::Tensor& prompt, const at::Tensor& row, const at::Tensor& count,
                   const at::Tensor& advance);

// packed_linear.cpp: [.., columns] both
at::Tensor packed_linear_cpu(const at::Tensor& x, const at::Tensor& weight, int64_t columns,
                             const std::optional<at::Tensor>& bias);
at::Tensor packed_swiglu_cpu(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up, int64_t columns);

// reward_head.cpp: [R]
at::Tensor reward_head_cpu(const at::Tensor& hidden, const at::Tensor& last, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& norm_weight,
                           double eps);

// rms_norm.cpp: the shape and dtype of x
at::Tensor rms_norm_cpu(const at::Tensor& x, const at::Tensor& weight, double eps);

// rotary_store.cpp: the shape and dtype of query, contiguous; keys and values are written in place.
at::Tensor rotary_store_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& where,
                            const at::Tensor& keys, const at::Tensor& values);

// segment_sample.cpp: (token int64, logprob float32), both [R]
std::tuple<at::Tensor, at::Tensor> segment_sample_cpu(const at::Tensor& logits, const at::Tensor& keys,
                                                      const at::Tensor& attempt, const at::Tensor& position,
                                                      const std::optional<at::Tensor>& source, double temperature,
                                                      int64_t top_k, double top_p, double min_p, int64_t stream);

}  // namespace stars
