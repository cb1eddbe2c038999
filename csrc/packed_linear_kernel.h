// packed_linear over some panels of the weight: y[m][n] = sum_k x[m][k] * w[n][k] + bias[n].
//
// Each output is one sum over k in ascending order, whatever the number of rows or threads, so a row's result does not
// depend on the rows beside it.
namespace stars {
namespace STARS_ISA {

// Panels and rows whose sums fill the registers: 8 x 3 vectors of 32 registers, or 6 x 2, or 3 x 4 of 16.
constexpr int kVectorsPerPanel = kPanel / kLanes<float>;
constexpr int kMaxPanels = STARS_VECTOR_BYTES == 64 ? kPanelsAtOnce : 1;
constexpr int kMaxRows = STARS_VECTOR_BYTES == 64 ? 8 : STARS_VECTOR_BYTES == 32 ? 6 : 3;

STARS_INLINE Vec<float> load_weights(const float* w) { return load(w); }
STARS_INLINE Vec<float> load_weights(const c10::BFloat16* w) {
  typedef uint16_t Halves __attribute__((vector_size(STARS_VECTOR_BYTES / 2)));
  Halves bits;
  __builtin_memcpy(&bits, w, sizeof bits);
  return bits_as<Vec<float>>(__builtin_convertvector(bits, Vec<uint32_t>) << 16);
}

// kRows rows of x and of y from panel `first` on, kPanels of them.
template <int kRows, int kPanels, typename W>
STARS_INLINE void linear_block(const PackedLinearArgs<W>& args, int64_t row, int64_t first) {
  constexpr int kVectors = kPanels * kVectorsPerPanel;
  const float* const x = args.x + row * args.x_row;
  const W* const w = args.weight + first * args.depth * kPanel;
  Vec<float> sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < args.depth; ++k) {
    Vec<float> right[kVectors];
    for (int p = 0; p < kPanels; ++p) __builtin_prefetch(w + (p * args.depth + k + 24) * kPanel);
    for (int p = 0; p < kPanels; ++p)
      for (int v = 0; v < kVectorsPerPanel; ++v)
        right[p * kVectorsPerPanel + v] = load_weights(w + (p * args.depth + k) * kPanel + v * kLanes<float>);
    for (int i = 0; i < kRows; ++i) {
      const Vec<float> left = broadcast(x[i * args.x_row + k]);
      for (int v = 0; v < kVectors; ++v) sum[i][v] = fma(left, right[v], sum[i][v]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    float* const y = args.y + (row + i) * args.y_row;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = first * kPanel + v * kLanes<float>;
      Vec<float> out = sum[i][v];
      if (column + kLanes<float> <= args.columns) {
        if (args.bias != nullptr) out += load(args.bias + column);
        store(y + column - args.y_first, out);
      } else {
        for (int64_t lane = 0; column + lane < args.columns; ++lane)
          y[column - args.y_first + lane] = out[lane] + (args.bias != nullptr ? args.bias[column + lane] : 0.0f);
      }
    }
  }
}

template <int kPanels, typename W>
inline void linear_panels(const PackedLinearArgs<W>& args, int64_t first) {
  int64_t row = 0;
  for (; row + kMaxRows <= args.rows; row += kMaxRows) linear_block<kMaxRows, kPanels>(args, row, first);
  switch (args.rows - row) {
    case 1: return linear_block<1, kPanels>(args, row, first);
    case 2: return linear_block<2, kPanels>(args, row, first);
#if STARS_VECTOR_BYTES >= 32
    case 3: return linear_block<3, kPanels>(args, row, first);
    case 4: return linear_block<4, kPanels>(args, row, first);
    case 5: return linear_block<5, kPanels>(args, row, first);
#endif
#if STARS_VECTOR_BYTES == 64
    case 6: return linear_block<6, kPanels>(args, row, first);
    case 7: return linear_block<7, kPanels>(args, row, first);
#endif
  }
}

template <typename W>
void packed_linear(const PackedLinearArgs<W>& args, int64_t begin, int64_t end) {
  int64_t panel = begin;
  for (; panel + kMaxPanels <= end; panel += kMaxPanels) linear_panels<kMaxPanels>(args, panel);
  for (; panel < end; ++panel) linear_panels<1>(args, panel);
}

STARS_INLINE Vec<float> silu(Vec<float> x) {  // x / (1 + e^-x), without overflow
  const Vec<float> e = exp_nonpositive(x < 0.0f ? x : -x);
  return x * (x < 0.0f ? e : broadcast(1.0f)) / (1.0f + e);
}

// silu(gate) * up into gate.y; up.y: scratch of [rows, kPanelsAtOnce * kPanel].
template <typename W>
void packed_swiglu(const PackedLinearArgs<W>& gate, PackedLinearArgs<W> up, int64_t begin, int64_t end) {
  up.y_row = kPanelsAtOnce * kPanel;
  int64_t panels;
  for (int64_t panel = begin; panel < end; panel += panels) {
    panels = panel + kMaxPanels <= end ? kMaxPanels : 1;
    up.y_first = panel * kPanel;
    packed_linear(gate, panel, panel + panels);
    packed_linear(up, panel, panel + panels);
    const int64_t left = gate.columns - up.y_first, columns = left < panels * kPanel ? left : panels * kPanel;
    for (int64_t row = 0; row < gate.rows; ++row) {
      float* const y = gate.y + row * gate.y_row + up.y_first;
      const float* const other = up.y + row * up.y_row;
      int64_t i = 0;
      for (; i + kLanes<float> <= columns; i += kLanes<float>) store(y + i, silu(load(y + i)) * load(other + i));
      if (i < columns) {
        float last[kLanes<float>] = {};
        for (int64_t j = i; j < columns; ++j) last[j - i] = y[j];
        store(last, silu(load(last)));
        for (int64_t j = i; j < columns; ++j) y[j] = last[j - i] * other[j];
      }
    }
  }
}

}  // namespace STARS_ISA
}  // namespace stars
