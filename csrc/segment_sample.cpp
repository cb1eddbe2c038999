#include "segment_sample.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#define STARS_KERNEL "segment_sample_kernel.h"
#include "check.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"
#include "philox.h"

namespace stars {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Filters {
  float temperature;
  int64_t top_k;
  double top_p, min_p;
  bool none(int64_t vocabulary) const {
    return (top_k == 0 || top_k >= vocabulary) && top_p >= 1 && min_p <= 0;
  }
};

struct Candidate {
  float score;
  int64_t id;
};

bool better(const Candidate& a, const Candidate& b) { return a.score != b.score ? a.score > b.score : a.id < b.id; }

// One row of logits made ready to draw from: a distribution over all ids, or over the candidates that the filters left.
class Row {
 public:
  Row(int64_t vocabulary, const Filters& filters)
      : vocabulary_(vocabulary), filters_(filters), maxima_((vocabulary + kMaxBlock - 1) / kMaxBlock) {}

  template <typename T>
  void prepare(const T* logits) {
    if constexpr (std::is_same_v<T, float>) {
      logits_ = logits;
    } else {
      widened_.resize(vocabulary_);
      STARS_PICK(widen_row<T>)(logits, vocabulary_, widened_.data());
      logits_ = widened_.data();
    }
    candidates_.clear();
    const bool numbers = STARS_PICK(block_maxima)(logits_, vocabulary_, maxima_.data());
    best_ = *std::max_element(maxima_.begin(), maxima_.end()) / filters_.temperature;
    bad_ = !numbers || !std::isfinite(best_);
    if (bad_) return;
    if (filters_.none(vocabulary_)) {
      sum_ = all_mass();
    } else {
      filter();
      sum_ = mass(candidates_.begin(), candidates_.end());
    }
  }

  // (token, logprob); (-1, NaN) where the row is broken.
  std::pair<int64_t, float> draw(const Draw& draw) const {
    if (bad_) return {-1, std::numeric_limits<float>::quiet_NaN()};
    Candidate winner{0, -1};
    if (candidates_.empty()) {
      winner.id = STARS_PICK(race_row)(logits_, vocabulary_, filters_.temperature, best_, draw);
      TORCH_INTERNAL_ASSERT(winner.id >= 0);
      winner.score = score(winner.id);
    } else {
      float best = kInf;
      for (const auto& candidate : candidates_) {
        const uint32_t bits = token_bits(draw.key, static_cast<uint32_t>(candidate.id), draw.position, draw.stream,
                                         draw.attempt);
        const float v = std::min((static_cast<float>(bits) + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f);
        const float key = std::log(-std::log1p(-v)) - (candidate.score - best_);
        if (key < best || (key == best && candidate.id < winner.id)) {
          best = key;
          winner = candidate;
        }
      }
    }
    return {winner.id, static_cast<float>(winner.score - best_ - std::log(sum_))};
  }

 private:
  using Iterator = std::vector<Candidate>::iterator;

  float score(int64_t id) const { return logits_[id] / filters_.temperature; }
  static double weight(const Candidate& candidate, float best) { return std::exp(candidate.score - best); }
  double mass(Iterator begin, Iterator end) const {
    return std::accumulate(begin, end, 0.0, [&](double sum, const Candidate& c) { return sum + weight(c, best_); });
  }
  double all_mass() const { return STARS_PICK(sum_exp)(logits_, vocabulary_, filters_.temperature, best_); }

  // All ids whose score is at least `bound`; never those of -inf. Most blocks are passed over by their maximum.
  void collect(float bound) {
    candidates_.clear();
    for (size_t block = 0; block < maxima_.size(); ++block) {
      const float top = maxima_[block] / filters_.temperature;
      if (!(top >= bound && top > -kInf)) continue;
      const int64_t begin = static_cast<int64_t>(block) * kMaxBlock, end = std::min(begin + kMaxBlock, vocabulary_);
      for (int64_t id = begin; id < end; ++id) {
        const float s = score(id);
        if (s >= bound && s > -kInf) candidates_.push_back({s, id});
      }
    }
  }

  // The ids with the `count` largest scores are among those of at least this score: so many blocks reach it.
  float bound_of(int64_t count) {
    if (count > static_cast<int64_t>(maxima_.size())) return -kInf;
    std::vector<float> copy = maxima_;
    std::nth_element(copy.begin(), copy.begin() + (count - 1), copy.end(), std::greater<float>());
    return copy[count - 1] / filters_.temperature;
  }

  // Leaves the filters' survivors in candidates_, in HF's order of filters.
  void filter() {
    const bool top_k = 0 < filters_.top_k && filters_.top_k < vocabulary_;
    if (top_k) {
      collect(bound_of(filters_.top_k));
      keep_top_k();
    }
    if (filters_.top_p < 1) {
      if (top_k) {
        keep_top_p(mass(candidates_.begin(), candidates_.end()));
      } else {
        // Most of the mass usually lies with few ids: look at those first.
        const double total = all_mass();
        for (int64_t count = 256;; count *= 16) {
          const float bound = bound_of(count);
          collect(bound);
          if (keep_top_p(total) || bound == -kInf) break;
        }
      }
    }
    if (filters_.min_p > 0) {
      if (!top_k && filters_.top_p >= 1) collect(best_ + std::log(static_cast<float>(filters_.min_p)) - 1e-3f);
      const auto low = [&](const Candidate& c) { return weight(c, best_) < static_cast<float>(filters_.min_p); };
      candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(), low), candidates_.end());
    }
  }

  void keep_top_k() {  // and ties with the k-th
    if (static_cast<int64_t>(candidates_.size()) <= filters_.top_k) return;
    std::vector<Candidate> copy = candidates_;
    std::nth_element(copy.begin(), copy.begin() + (filters_.top_k - 1), copy.end(), better);
    const float kth = copy[filters_.top_k - 1].score;
    const auto low = [&](const Candidate& c) { return c.score < kth; };
    candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(), low), candidates_.end());
  }

  // Cuts candidates_ to the shortest prefix in (score descending, id ascending) whose mass reaches top_p of `total`:
  // a quickselect by mass. False where all of them together do not reach it.
  bool keep_top_p(double total) {
    const double wanted = filters_.top_p * total;
    if (mass(candidates_.begin(), candidates_.end()) < wanted) return false;
    auto begin = candidates_.begin(), end = candidates_.end();  // the last survivor lies in [begin, end)
    double before = 0;                                          // mass of what is better than *begin
    while (end - begin > 1) {
      const auto middle = begin + (end - begin) / 2;
      std::nth_element(begin, middle, end, better);
      const double upper = before + mass(begin, middle);
      if (upper >= wanted) {
        end = middle;
      } else {
        begin = middle;
        before = upper;
      }
    }
    candidates_.erase(end, candidates_.end());
    return true;
  }

  const int64_t vocabulary_;
  const Filters filters_;
  const float* logits_ = nullptr;
  std::vector<float> widened_, maxima_;
  std::vector<Candidate> candidates_;
  float best_ = 0;   // the largest score
  double sum_ = 0;   // of exp(score - best_) over what may be drawn
  bool bad_ = false;
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> segment_sample_cpu(const at::Tensor& logits, const at::Tensor& keys,
                                                      const at::Tensor& attempt, const at::Tensor& position,
                                                      const std::optional<at::Tensor>& source, double temperature,
                                                      int64_t top_k, double top_p, double min_p, int64_t stream) {
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "logits: expected shape [N, V], V > 0, found ", logits.sizes());
  TORCH_CHECK(keys.dim() == 1, "keys: expected shape [R], found ", keys.sizes());
  const int64_t rows = keys.size(0), sources = logits.size(0), vocabulary = logits.size(1);
  check_tensor(keys, "keys", {rows}, at::kLong);
  check_tensor(attempt, "attempt", {rows}, at::kLong);
  check_tensor(position, "position", {rows}, at::kLong);
  if (source) check_tensor(*source, "source", {rows}, at::kLong);
  TORCH_CHECK(source || sources == rows, "logits: expected ", rows, " rows, found ", sources);

  const auto logits_d = dense_last(logits);
  const auto keys_c = keys.contiguous(), attempt_c = attempt.contiguous(), position_c = position.contiguous();
  const auto source_c = source ? source->contiguous() : at::Tensor();
  std::vector<int64_t> from(rows), order(rows);  // the row of logits of each draw; draws by it
  for (int64_t r = 0; r < rows; ++r) {
    from[r] = source ? source_c.const_data_ptr<int64_t>()[r] : r;
    TORCH_CHECK_INDEX(0 <= from[r] && from[r] < sources, "source: expected 0 to ", sources - 1, ", found ", from[r]);
  }
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return from[a] < from[b]; });

  auto token = at::empty({rows}, keys.options()), logprob = at::empty({rows}, logits.options().dtype(at::kFloat));
  const Filters filters{static_cast<float>(temperature), top_k, top_p, min_p};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "stars::segment_sample", [&] {
    const auto* data = logits_d.const_data_ptr<scalar_t>();
    auto* const tokens = token.mutable_data_ptr<int64_t>();
    auto* const logprobs = logprob.mutable_data_ptr<float>();
    parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      Row row(vocabulary, filters);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t r = order[i];
        if (i == begin || from[r] != from[order[i - 1]]) row.prepare(data + from[r] * logits_d.stride(0));
        const Draw draw{static_cast<uint64_t>(keys_c.const_data_ptr<int64_t>()[r]),
                        static_cast<uint32_t>(position_c.const_data_ptr<int64_t>()[r]), static_cast<uint32_t>(stream),
                        static_cast<uint32_t>(attempt_c.const_data_ptr<int64_t>()[r])};
        std::tie(tokens[r], logprobs[r]) = row.draw(draw);
      }
    });
  });
  return {token, logprob};
}

}  // namespace stars
