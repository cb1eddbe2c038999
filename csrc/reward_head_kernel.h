// reward_head of one row: A is the arithmetic's type, of the head's weights too.
namespace stars {
namespace STARS_ISA {

// (sum of x^2, sum of x * weight * norm_weight), norm_weight null for none. Sums in many short parts: fast, and nearer
// the truth than one long sum.
template <typename T, typename A>
inline void head_sums(const T* x, const A* weight, const A* norm_weight, int64_t size, A* squares, A* products) {
  constexpr int64_t kParts = 32;
  A square[kParts] = {}, product[kParts] = {};
  for (int64_t begin = 0; begin < size; begin += kParts) {
    const int64_t count = begin + kParts < size ? kParts : size - begin;
    for (int64_t i = 0; i < count; ++i) {
      const A v = widen(x[begin + i]);
      const A w = norm_weight != nullptr ? weight[begin + i] * norm_weight[begin + i] : weight[begin + i];
      square[i] += v * v;
      product[i] += v * w;
    }
  }
  for (int64_t step = kParts / 2; step > 0; step /= 2)
    for (int64_t i = 0; i < step; ++i) {
      square[i] += square[i + step];
      product[i] += product[i + step];
    }
  *squares = square[0];
  *products = product[0];
}

}  // namespace STARS_ISA
}  // namespace stars
