// Philox4x32-10 (Salmon et al., 2011) and what STARS draws from it. Counter-based: no state, so every random
// number is a function of (key, token id, position, attempt) alone, and the same integers come out on a GPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define STARS_HD __host__ __device__
#else
#define STARS_HD
#endif

namespace stars {

// Independent streams under one key; they sit in the top byte of counter word 2.
constexpr uint32_t kStreamSample = 0;
constexpr uint32_t kStreamAccept = 1;
constexpr uint32_t kStreamCalibrate = 2;

struct Philox4 {
  uint32_t v[4];
};

STARS_HD inline Philox4 philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                                   uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0;
    const uint64_t b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Noise of the four token ids 4 * block .. 4 * block + 3, so a sweep over the vocabulary needs V / 4 calls.
STARS_HD inline Philox4 token_block(uint64_t key, uint32_t block, uint32_t position, uint32_t stream,
                                    uint32_t attempt) {
  const auto low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
  return philox4x32(block, position, stream << 24 | attempt, 0, low, high);
}

STARS_HD inline uint32_t token_bits(uint64_t key, uint32_t token_id, uint32_t position, uint32_t stream,
                                    uint32_t attempt) {
  return token_block(key, token_id >> 2, position, stream, attempt).v[token_id & 3];
}

// u(a) of an acceptance test, in (0, 1): all 32 bits survive in a double.
STARS_HD inline double accept_uniform(uint64_t key, uint32_t position, uint32_t attempt) {
  return (token_bits(key, 0, position, kStreamAccept, attempt) + 0.5) * 0x1p-32;
}

}  // namespace stars
