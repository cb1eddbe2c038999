// content_hash over some words of a tensor: the sum, modulo 2^64, of mix(word + (place + 1) * golden).
namespace stars {
namespace STARS_ISA {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

// SplitMix64's finalizer, a bijection of 64-bit words; Z is a word or a vector of them.
template <typename Z>
STARS_INLINE Z mix(Z z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// Words [begin, end) of `bytes`, all of them whole.
inline uint64_t hash_words(const char* bytes, int64_t begin, int64_t end) {
  constexpr int64_t kStep = kLanes<uint64_t>, kWord = sizeof(uint64_t);
  constexpr int kSums = 4;  // side by side, as each mix waits for its own products
  Vec<uint64_t> sum[kSums] = {}, place[kSums];
  for (int j = 0; j < kSums; ++j)
    place[j] = (lane_numbers<uint64_t>() + static_cast<uint64_t>(begin + j * kStep + 1)) * kGolden;
  int64_t i = begin;
  for (; i + kSums * kStep <= end; i += kSums * kStep) {
    for (int j = 0; j < kSums; ++j) {
      Vec<uint64_t> word;
      __builtin_memcpy(&word, bytes + (i + j * kStep) * kWord, sizeof word);
      sum[j] += mix(word + place[j]);
      place[j] += static_cast<uint64_t>(kSums * kStep) * kGolden;
    }
  }
  uint64_t total = 0;
  for (int j = 0; j < kSums; ++j)
    for (int lane = 0; lane < kStep; ++lane) total += sum[j][lane];
  for (; i < end; ++i) {
    uint64_t word;
    __builtin_memcpy(&word, bytes + i * kWord, sizeof word);
    total += mix(word + static_cast<uint64_t>(i + 1) * kGolden);
  }
  return total;
}

}  // namespace STARS_ISA
}  // namespace stars
