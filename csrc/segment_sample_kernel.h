// The sweeps of segment_sample over a row of V scores in fp32: each reads the row once and stores nothing of its size.
namespace stars {
namespace STARS_ISA {

template <typename T>
inline void widen_row(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(widen(from[i]));
}

// Maximum of each kMaxBlock values. Returns false where there is a NaN.
inline bool block_maxima(const float* x, int64_t count, float* maxima) {
  Vec<int32_t> nan = {};
  bool tail_nan = false;
  for (int64_t begin = 0; begin < count; begin += kMaxBlock) {
    Vec<float> max = broadcast(-__builtin_inff());
    const int64_t end = begin + kMaxBlock < count ? begin + kMaxBlock : count;
    int64_t i = begin;
    for (; i + kLanes<float> <= end; i += kLanes<float>) {
      const Vec<float> v = load(x + i);
      nan |= v != v;
      max = maximum(v, max);
    }
    float best = -__builtin_inff();
    for (int lane = 0; lane < kLanes<float>; ++lane) best = max[lane] > best ? max[lane] : best;
    for (; i < end; ++i) {
      tail_nan |= x[i] != x[i];
      best = x[i] > best ? x[i] : best;
    }
    maxima[begin / kMaxBlock] = best;
  }
  return !any(nan) && !tail_nan;
}

// sum of exp(x / temperature - max); in fp32 within a block of kMaxBlock, in fp64 over the blocks.
inline double sum_exp(const float* x, int64_t count, float temperature, float max) {
  double sum = 0;
  for (int64_t begin = 0; begin < count; begin += kMaxBlock) {
    float padded[kMaxBlock];
    const float* block = x + begin;
    if (count - begin < kMaxBlock) {
      for (int64_t i = 0; i < kMaxBlock; ++i) padded[i] = begin + i < count ? block[i] : -__builtin_inff();
      block = padded;
    }
    Vec<float> part = {};
    for (int64_t i = 0; i < kMaxBlock; i += kLanes<float>) part += exp_nonpositive(load(block + i) / temperature - max);
    for (int lane = 0; lane < kLanes<float>; ++lane) sum += part[lane];
  }
  return sum;
}

// Philox4x32-10 of csrc/philox.h for kLanes<uint64_t> blocks: the bits of 2 * kLanes<uint32_t> ids from 4 * block on.
STARS_INLINE void token_bits(uint32_t block, const Draw& draw, Vec<uint32_t>& low, Vec<uint32_t>& high) {
  Vec<uint64_t> c0 = lane_numbers<uint64_t>() + block, c1 = broadcast<uint64_t>(draw.position);
  Vec<uint64_t> c2 = broadcast<uint64_t>(draw.stream << 24 | draw.attempt), c3 = {};
  uint32_t k0 = static_cast<uint32_t>(draw.key), k1 = static_cast<uint32_t>(draw.key >> 32);
  for (int round = 0; round < 10; ++round) {  // the high half of a lane may hold anything: no product reads it
    const Vec<uint64_t> a = multiply_low(c0, broadcast<uint64_t>(0xD2511F53u));
    const Vec<uint64_t> b = multiply_low(c2, broadcast<uint64_t>(0xCD9E8D57u));
    c0 = (b >> 32) ^ c1 ^ k0;
    c1 = b;
    c2 = (a >> 32) ^ c3 ^ k1;
    c3 = a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const Vec<uint64_t> first = (c0 & 0xffffffffu) | c1 << 32, second = (c2 & 0xffffffffu) | c3 << 32;
  Vec<uint64_t> to_low, to_high;  // of lane i: where it comes from in (first, second)
  constexpr int kHalf = kLanes<uint64_t> / 2;
  for (int i = 0; i < kLanes<uint64_t>; ++i) {
    to_low[i] = i / 2 + i % 2 * kLanes<uint64_t>;
    to_high[i] = to_low[i] + kHalf;
  }
  low = (Vec<uint32_t>)__builtin_shuffle(first, second, to_low);
  high = (Vec<uint32_t>)__builtin_shuffle(first, second, to_high);
}

STARS_INLINE Vec<float> uniform(Vec<uint32_t> bits) {
  const Vec<float> v = (__builtin_convertvector(bits, Vec<float>) + 0.5f) * 0x1p-32f;
  const float most = 1.0f - 0x1p-24f;
  return v < most ? v : broadcast(most);
}

// The winner of the race over all `count` ids: the smallest log(-log1p(-v)) - (x / temperature - max), first of equals.
//
// Only ids that may win pay for logarithms: log(-log1p(-v)) >= log(v), which is at least ln 2 times a line through
// v's exponent and mantissa. `least` lacks the maximum, which `bound` has instead.
inline int64_t race_row(const float* x, int64_t count, float temperature, float max, const Draw& draw) {
  constexpr int64_t kLane = kLanes<uint32_t>;
  float best = __builtin_inff(), bound = best;
  int64_t winner = -1;
  const float inverse = 1.0f / temperature;
  for (int64_t begin = 0; begin < count; begin += 2 * kLane) {
    float padded[2 * kLane];
    const float* block = x + begin;
    if (count - begin < 2 * kLane) {
      for (int64_t i = 0; i < 2 * kLane; ++i) padded[i] = begin + i < count ? block[i] : -__builtin_inff();
      block = padded;
    }
    Vec<uint32_t> bits[2];
    token_bits(static_cast<uint32_t>(begin / 4), draw, bits[0], bits[1]);
    for (int half = 0; half < 2; ++half) {
      const Vec<float> v = uniform(bits[half]), logits = load(block + half * kLane);
      const Vec<float> log2_v = __builtin_convertvector(bits_as<Vec<int32_t>>(v), Vec<float>) * 0x1p-23f - 127.0f;
      const Vec<float> least = fma(log2_v, broadcast(0.693147181f), -(logits * inverse));
      if (!any(least <= bound)) continue;
      for (int64_t lane = 0; lane < kLane; ++lane) {
        if (!(least[lane] <= bound)) continue;
        const float key = __builtin_logf(-__builtin_log1pf(-v[lane])) - (logits[lane] / temperature - max);
        if (key < best) {
          best = key;
          winner = begin + half * kLane + lane;
          const float rounding = 1e-3f + 1e-6f * (__builtin_fabsf(best) + __builtin_fabsf(max));  // of `least`
          bound = best - max + rounding;
        }
      }
    }
  }
  return winner;
}

}  // namespace STARS_ISA
}  // namespace stars
