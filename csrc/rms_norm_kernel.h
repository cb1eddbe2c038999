// rms_norm of one row: sums in many short parts, as in reward_head; and the sum of two rows, for add_rms_norm.
namespace stars {
namespace STARS_ISA {

template <typename T, typename A>
void rms_norm_row(const T* x, const A* weight, int64_t size, A eps, T* y) {
  constexpr int64_t kParts = 32;
  A part[kParts] = {};
  for (int64_t begin = 0; begin < size; begin += kParts) {
    const int64_t count = begin + kParts < size ? kParts : size - begin;
    for (int64_t i = 0; i < count; ++i) {
      const A v = widen(x[begin + i]);
      part[i] += v * v;
    }
  }
  for (int64_t step = kParts / 2; step > 0; step /= 2)
    for (int64_t i = 0; i < step; ++i) part[i] += part[i + step];
  const A scale = 1 / static_cast<A>(__builtin_sqrt(part[0] / size + eps));
  for (int64_t i = 0; i < size; ++i) {
    narrow(widen(x[i]) * scale, y[i]);  // rounded before the product, as LlamaRMSNorm does
    narrow(widen(y[i]) * weight[i], y[i]);
  }
}

template <typename T>
void add_row(const T* a, const T* b, int64_t size, T* y) {
  for (int64_t i = 0; i < size; ++i) narrow(widen(a[i]) + widen(b[i]), y[i]);
}

}  // namespace STARS_ISA
}  // namespace stars
