// One instruction set's vectors. No include guard: isa.h includes this once for each, in a namespace of its own.
//
// A Vec<T> is STARS_VECTOR_BYTES of float, double or an integer, with the compiler's own operators: + - * / < & | ?:
// work lane by lane, and with a scalar. Sums that must be the same on every machine may use `fma` only where both
// orders of rounding are acceptable, since `plain` has none.
namespace stars {
namespace STARS_ISA {

template <typename T>
struct VecOf {
  typedef T type __attribute__((vector_size(STARS_VECTOR_BYTES)));
};
template <typename T>
using Vec = typename VecOf<T>::type;
template <typename T>
constexpr int kLanes = STARS_VECTOR_BYTES / sizeof(T);

template <int kBytes>
struct IntOfSize;
template <>
struct IntOfSize<4> {
  using type = int32_t;
};
template <>
struct IntOfSize<8> {
  using type = int64_t;
};
// The integer as wide as T: what a comparison of Vec<T> gives, and what its bits are.
template <typename T>
using IntOf = typename IntOfSize<sizeof(T)>::type;

template <typename T>
STARS_INLINE Vec<T> load(const T* from) {
  Vec<T> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <typename T>
STARS_INLINE void store(T* to, Vec<T> v) {
  __builtin_memcpy(to, &v, sizeof v);
}

template <typename T>
STARS_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <typename T>
STARS_INLINE Vec<T> lane_numbers() {
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = static_cast<T>(i);
  return v;
}

template <typename To, typename From>
STARS_INLINE To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  __builtin_memcpy(&out, &v, sizeof out);
  return out;
}

STARS_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if STARS_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif STARS_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

STARS_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if STARS_VECTOR_BYTES == 64
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif STARS_VECTOR_BYTES == 32
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__ARM_NEON)
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

template <typename V>
STARS_INLINE V maximum(V a, V b) {  // b where either is NaN
  return a > b ? a : b;
}

// e^x for x <= 0 (Cephes: range reduction, a polynomial of degree 7); 0 below -87, NaN for NaN. About 1 ulp with an fma.
STARS_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  const float shifter = 0x1.8p23f;  // adding it rounds to an integer, which then lies in the low bits
  const Vec<float> shifted = fma(x, broadcast(1.44269504088896341f), broadcast(shifter));
  const Vec<float> n = shifted - shifter;
  Vec<float> r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec<float> p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const Vec<int32_t> exponent = (bits_as<Vec<int32_t>>(shifted) + 127) << 23;
  return x < -87.0f ? Vec<float>{} : p * bits_as<Vec<float>>(exponent);
}

STARS_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

STARS_INLINE bool any(Vec<int32_t> mask) {  // of a comparison: whether it holds in some lane
#if STARS_VECTOR_BYTES == 64
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif STARS_VECTOR_BYTES == 32
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_ps((__m128)mask) != 0;
#elif defined(__ARM_NEON)
  return vmaxvq_u32((uint32x4_t)mask) != 0;
#else
  for (int i = 0; i < kLanes<int32_t>; ++i)
    if (mask[i]) return true;
  return false;
#endif
}

// 64-bit products of the low halves of each lane.
STARS_INLINE Vec<uint64_t> multiply_low(Vec<uint64_t> a, Vec<uint64_t> b) {
#if STARS_VECTOR_BYTES == 64
  return (Vec<uint64_t>)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif STARS_VECTOR_BYTES == 32
  return (Vec<uint64_t>)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (Vec<uint64_t>)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Storage types and the arithmetic's: exact one way, to nearest (ties to even) the other.
STARS_INLINE float widen(const float& x) { return x; }
STARS_INLINE double widen(const double& x) { return x; }
STARS_INLINE float widen(const c10::BFloat16& x) { return bits_as<float>(static_cast<uint32_t>(x.x) << 16); }
STARS_INLINE float widen(const c10::Half& x) {
#if STARS_VECTOR_BYTES > 16
  return _cvtsh_ss(x.x);
#else
  return x;
#endif
}

STARS_INLINE void narrow(float x, float& to) { to = x; }
STARS_INLINE void narrow(double x, double& to) { to = x; }
STARS_INLINE void narrow(float x, c10::BFloat16& to) {  // to nearest, ties to even; NaN stays NaN
  const auto bits = bits_as<uint32_t>(x);
  to.x = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
STARS_INLINE void narrow(float x, c10::Half& to) {
#if STARS_VECTOR_BYTES > 16
  to.x = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  to = x;
#endif
}

}  // namespace STARS_ISA
}  // namespace stars
