// The decision of one prompt in one round: a barrier-free body for one thread, for the host and for CUDA.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"

namespace stars {

enum Outcome : int64_t {
  kRetry = 0,     // nothing accepted yet, attempts remain
  kAccepted = 1,  // `chosen` is the accepted column
  kFallback = 2,  // attempts used up: the running best is taken
  kNan = 3,       // the reward of column `chosen` is NaN
};

// P prompts, W columns (attempts judged in this round); arrays are contiguous where no stride is given.
template <typename Reward>
struct AcceptArgs {
  // inputs
  const Reward* rewards;         // [P, W]
  const bool* valid;             // [P, W]
  const double* thresholds;      // [P, W], tau
  const int64_t* keys;           // [P], a 64-bit Philox key as a bit pattern
  const int64_t* position;       // [P], answer length where the segment starts
  const int64_t* first_attempt;  // [P], attempt number of column 0
  int64_t width;
  int64_t max_attempts;
  double beta;
  bool hard;
  // running best over rounds: read and written; attempt -1 means none yet
  double* best_reward;  // [P]
  int64_t best_reward_stride;
  int64_t* best_attempt;  // [P]
  int64_t best_attempt_stride;
  // outputs
  int64_t* chosen;   // [P], accepted or new best column, else -1
  int64_t* outcome;  // [P]
};

// beta is the acceptance temperature. u < 1 always, so min(1, exp(..)) needs no min.
STARS_HD inline bool accepts(double reward, double tau, double beta, bool hard, double u) {
  return hard ? reward >= tau : u < std::exp((reward - tau) / beta);
}

template <typename Reward>
STARS_HD inline void accept_prompt(const AcceptArgs<Reward>& args, int64_t p) {
  double& best_reward = args.best_reward[p * args.best_reward_stride];
  int64_t& best_attempt = args.best_attempt[p * args.best_attempt_stride];
  int64_t chosen = -1;
  int64_t outcome = kRetry;
  for (int64_t column = 0; column < args.width && outcome == kRetry; ++column) {
    const int64_t cell = p * args.width + column;
    if (!args.valid[cell]) continue;
    const int64_t attempt = args.first_attempt[p] + column;
    const double reward = args.rewards[cell];
    const double u = accept_uniform(args.keys[p], args.position[p], attempt);
    if (reward != reward) {
      chosen = column;
      outcome = kNan;
    } else if (accepts(reward, args.thresholds[cell], args.beta, args.hard, u)) {
      chosen = column;
      outcome = kAccepted;
    } else {
      if (best_attempt < 0 || reward > best_reward) {  // strict: a tie stays with the lower attempt
        best_reward = reward;
        best_attempt = attempt;
        chosen = column;
      }
      if (attempt == args.max_attempts - 1) outcome = kFallback;
    }
  }
  args.chosen[p] = chosen;
  args.outcome[p] = outcome;
}

constexpr int64_t kAcceptBlock = 128;  // threads of a CUDA block

STARS_HD constexpr int64_t accept_blocks(int64_t prompts) { return (prompts + kAcceptBlock - 1) / kAcceptBlock; }

// All that one CUDA thread does. A grid's last block may reach past the prompts.
template <typename Reward>
STARS_HD inline void accept_thread(const AcceptArgs<Reward>& args, int64_t prompts, int64_t block, int64_t thread) {
  const int64_t p = block * kAcceptBlock + thread;
  if (p < prompts) accept_prompt(args, p);
}

}  // namespace stars
