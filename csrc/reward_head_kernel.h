// reward_head of one row: A is the arithmetic's type, of the head's weights too.
namespace stars {
namespace STARS_ISA {

// (sum of x^2, sum of x * weight * norm_weight), norm_weight null for none.
template <typename T, typename A>
inline void head_sums(const T* x, const A* weight, const A* norm_weight, int64_t size, A* squares, A* products) {
  Vec<A> square = {}, product = {};
  int64_t d = 0;
  for (; d + kLanes<A> <= size; d += kLanes<A>) {
    Vec<A> v;
    for (int lane = 0; lane < kLanes<A>; ++lane) v[lane] = widen(x[d + lane]);
    Vec<A> w = load(weight + d);
    if (norm_weight != nullptr) w *= load(norm_weight + d);
    square = fma(v, v, square);
    product = fma(v, w, product);
  }
  A squared = 0, summed = 0;
  for (int lane = 0; lane < kLanes<A>; ++lane) {
    squared += square[lane];
    summed += product[lane];
  }
  for (; d < size; ++d) {
    const A v = widen(x[d]);
    squared += v * v;
    summed += v * weight[d] * (norm_weight != nullptr ? norm_weight[d] : A(1));
  }
  *squares = squared;
  *products = summed;
}

}  // namespace STARS_ISA
}  // namespace stars
