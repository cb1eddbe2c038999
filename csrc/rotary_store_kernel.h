// rotary_store of one head: x * cos + rotate_half(x) * sin, each product rounded and then the sum.
namespace stars {
namespace STARS_ISA {

template <typename T>
void turn_head(const T* x, const T* cos, const T* sin, int64_t half, T* y) {
  for (int64_t i = 0; i < half; ++i) {
    T straight, crossed;
    narrow(widen(x[i]) * widen(cos[i]), straight);
    narrow(-widen(x[half + i]) * widen(sin[i]), crossed);
    narrow(widen(straight) + widen(crossed), y[i]);
  }
  for (int64_t i = 0; i < half; ++i) {
    T straight, crossed;
    narrow(widen(x[half + i]) * widen(cos[half + i]), straight);
    narrow(widen(x[i]) * widen(sin[half + i]), crossed);
    narrow(widen(straight) + widen(crossed), y[half + i]);
  }
}

}  // namespace STARS_ISA
}  // namespace stars
