// fork_attention for one block of columns (see ForkAttentionBlock): flash attention with the columns in the lanes.
//
// Keys come in tiles of kTileKeys, from the start of the prefix and again from the start of a row's suffix. A tile's
// softmax is taken by itself, then merged into the state by log-sum-exp, in order. A column's arithmetic thus depends
// on nothing but its own query, prefix and suffix: not on its neighbours, the block it is in, or the threads.
namespace stars {
namespace STARS_ISA {

// Room for full vectors from any column on: what is computed there belongs to no column and is dropped.
constexpr int64_t kStride = kBlockColumns + 16;
// Vectors side by side that fill the registers: 4 x 4 accumulators of 32 registers, or 4 x 2 of 16.
constexpr int kMaxVectors = STARS_VECTOR_BYTES == 64 ? 4 : 2;

// c[i][0 .. kVectors * lanes) = sum_t a[i * a_row + t * a_depth] * b[t][..] for kRows values of i.
template <int kRows, int kVectors, typename A>
STARS_INLINE void product_block(const A* a, int64_t a_row, int64_t a_depth, const A* b, A* c, int64_t depth) {
  Vec<A> sum[kRows][kVectors] = {};
  for (int64_t t = 0; t < depth; ++t) {
    Vec<A> right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + t * kStride + v * kLanes<A>);
    for (int i = 0; i < kRows; ++i) {
      const Vec<A> left = broadcast(a[i * a_row + t * a_depth]);
      for (int v = 0; v < kVectors; ++v) sum[i][v] = fma(left, right[v], sum[i][v]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) store(c + i * kStride + v * kLanes<A>, sum[i][v]);
}

template <int kVectors, typename A>
inline void product_panel(const A* a, int64_t a_row, int64_t a_depth, const A* b, A* c, int64_t rows, int64_t depth) {
  constexpr int kRows = kVectors == 1 ? 8 : 4;  // enough sums in flight to hide an fma's latency
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    product_block<kRows, kVectors>(a + i * a_row, a_row, a_depth, b, c + i * kStride, depth);
  if (kRows == 8 && i + 4 <= rows) {
    product_block<4, kVectors>(a + i * a_row, a_row, a_depth, b, c + i * kStride, depth);
    i += 4;
  }
  a += i * a_row;
  c += i * kStride;
  switch (rows - i) {
    case 1: return product_block<1, kVectors>(a, a_row, a_depth, b, c, depth);
    case 2: return product_block<2, kVectors>(a, a_row, a_depth, b, c, depth);
    case 3: return product_block<3, kVectors>(a, a_row, a_depth, b, c, depth);
  }
}

// c[i][j] = sum_t a[i * a_row + t * a_depth] * b[t][j], i < rows, j < columns; b and c have rows of kStride.
template <typename A>
inline void product(const A* a, int64_t a_row, int64_t a_depth, const A* b, A* c, int64_t rows, int64_t columns,
                    int64_t depth) {
  for (int64_t j = 0; j < columns; j += kMaxVectors * kLanes<A>) {
    const int64_t vectors = (columns - j + kLanes<A> - 1) / kLanes<A>;
    switch (vectors < kMaxVectors ? vectors : kMaxVectors) {
      case 1: product_panel<1>(a, a_row, a_depth, b + j, c + j, rows, depth); break;
      case 2: product_panel<2>(a, a_row, a_depth, b + j, c + j, rows, depth); break;
#if STARS_VECTOR_BYTES == 64
      case 3: product_panel<3>(a, a_row, a_depth, b + j, c + j, rows, depth); break;
      case 4: product_panel<4>(a, a_row, a_depth, b + j, c + j, rows, depth); break;
#endif
    }
  }
}

// Softmax sums of `columns` columns over some keys: the weights are exp(score - max) / sum, out = sum of weight * V.
template <typename A>
struct State {
  A max[kStride], sum[kStride];
  A* out;  // [Dv, kStride], not yet divided by the sum
};

template <typename A>
struct Scratch {
  A* query;     // [Dk, kStride] queries times scale, one a column
  A* scores;    // [kTileKeys, kStride]
  A* tile_out;  // [Dv, kStride]
  A* state_out;
  A* keys;    // [kTileKeys, Dk] widened, where T is not A
  A* values;  // [kTileKeys, Dv]
  static int64_t size(int64_t key_size, int64_t value_size) {
    return (key_size + kTileKeys + 2 * value_size) * kStride + kTileKeys * (key_size + value_size);
  }
  Scratch(A* memory, int64_t key_size, int64_t value_size)
      : query(memory),
        scores(query + key_size * kStride),
        tile_out(scores + kTileKeys * kStride),
        state_out(tile_out + value_size * kStride),
        keys(state_out + value_size * kStride),
        values(keys + kTileKeys * key_size) {}
};

// A tile's rows as A: in place where T is A, else widened into `to`. Sets the stride of the rows.
template <typename A>
STARS_INLINE const A* widen_rows(const A* from, int64_t, int64_t, A*, int64_t&) {
  return from;
}
template <typename A, typename T>
STARS_INLINE const A* widen_rows(const T* from, int64_t rows, int64_t size, A* to, int64_t& stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < size; ++d) to[i * size + d] = widen(from[i * stride + d]);
  stride = size;
  return to;
}

// Which keys a column sees: [low, high), counted from the start of the prefix on, its suffix following.
template <typename A>
struct Visible {
  IntOf<A> low[kStride], high[kStride];
};

// Columns [first, first + columns) over one tile of `count` keys, the first of them being key number `begin`.
template <typename A, typename T>
inline void attend_tile(const ForkAttentionArgs<T>& args, const Scratch<A>& scratch, const Visible<A>& visible,
                        State<A>& state, int64_t first, int64_t columns, const T* key, int64_t key_stride,
                        const T* value, int64_t value_stride, int64_t begin, int64_t count) {
  using Int = IntOf<A>;
  constexpr int64_t kLane = kLanes<A>;
  bool all = true, none = true;
  for (int64_t c = first; c < first + columns; ++c) {
    all &= visible.low[c] <= begin && begin + count <= visible.high[c];
    none &= begin + count <= visible.low[c] || visible.high[c] <= begin;
  }
  if (none) return;

  const A* k = widen_rows(key, count, args.key_size, scratch.keys, key_stride);
  A* const scores = scratch.scores;
  product(k, key_stride, 1, scratch.query + first, scores, count, columns, args.key_size);
  if (args.softcap > 0) {
    const A cap = static_cast<A>(args.softcap);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < columns; ++c) {
        A& score = scores[i * kStride + c];
        score = cap * static_cast<A>(__builtin_tanh(score / cap));
      }
  }
  A maxima[kStride], sums[kStride];
  for (int64_t c = 0; c < columns; c += kLane) {
    A* const column = scores + c;
    const Vec<A> hidden = broadcast(static_cast<A>(-__builtin_inff()));
    if (!all) {
      const Vec<Int> low = load(visible.low + first + c), high = load(visible.high + first + c);
      for (int64_t i = 0; i < count; ++i) {
        const auto at = broadcast(static_cast<Int>(begin + i));
        store(column + i * kStride, (at >= low) & (at < high) ? load(column + i * kStride) : hidden);
      }
    }
    Vec<A> max = hidden;
    for (int64_t i = 0; i < count; ++i) max = maximum(load(column + i * kStride), max);
    const Vec<A> shift = max == hidden ? Vec<A>{} : max;
    Vec<A> sum = {};
    for (int64_t i = 0; i < count; ++i) {
      const Vec<A> weight = exp_nonpositive(load(column + i * kStride) - shift);
      store(column + i * kStride, weight);
      sum += weight;
    }
    store(maxima + c, max);
    store(sums + c, sum);
  }
  const A* v = widen_rows(value, count, args.value_size, scratch.values, value_stride);
  product(v, 1, value_stride, scores, scratch.tile_out, args.value_size, columns, count);

  for (int64_t c = 0; c < columns; c += kLane) {
    const int64_t at = first + c;
    const Vec<A> before = load(state.max + at), tile = load(maxima + c), tile_sum = load(sums + c);
    // The other lanes are neighbours', or see none of these keys, whose values may be infinite.
    const auto mine = (lane_numbers<Int>() < static_cast<Int>(columns - c)) & (tile_sum != static_cast<A>(0));
    const Vec<A> max = maximum(before, tile);
    const Vec<A> shift = max == static_cast<A>(-__builtin_inff()) ? Vec<A>{} : max;
    const Vec<A> keep = exp_nonpositive(before - shift), add = exp_nonpositive(tile - shift);
    const Vec<A> sum = load(state.sum + at);
    store(state.max + at, mine ? max : before);
    store(state.sum + at, mine ? fma(sum, keep, tile_sum * add) : sum);
    for (int64_t d = 0; d < args.value_size; ++d) {
      const Vec<A> out = load(state.out + d * kStride + at);
      const Vec<A> merged = fma(out, keep, load(scratch.tile_out + d * kStride + c) * add);
      store(state.out + d * kStride + at, mine ? merged : out);
    }
  }
}

STARS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
STARS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename T, typename A>
void attend_block(const ForkAttentionArgs<T>& args, const ForkAttentionBlock& block, A* memory) {
  const Scratch<A> scratch(memory, args.key_size, args.value_size);
  const int64_t per_row = args.steps * args.group, heads = args.kv_heads * args.group;
  const int64_t prefix = args.lengths[block.prompt];
  Visible<A> visible;
  State<A> state;
  state.out = scratch.state_out;
  for (int64_t c = 0; c < kStride; ++c) {
    state.max[c] = -__builtin_inff();
    state.sum[c] = 0;
    visible.low[c] = visible.high[c] = 0;
  }
  for (int64_t i = 0; i < args.value_size * kStride; ++i) state.out[i] = 0;
  for (int64_t i = 0; i < args.key_size * kStride; ++i) scratch.query[i] = 0;

  for (int64_t c = 0; c < block.count; ++c) {
    const int64_t column = block.first + c, row = block.rows[column / per_row];
    const int64_t step = column % per_row / args.group;
    if (step >= args.query_len[row]) continue;
    const int64_t position = prefix + args.suffix_len[row] - args.query_len[row] + step;
    visible.high[c] = static_cast<IntOf<A>>(position + 1);
    if (args.window > 0) visible.low[c] = static_cast<IntOf<A>>(larger(0, position + 1 - args.window));
    const int64_t head = block.kv_head * args.group + column % args.group;
    const T* query = args.query + row * args.query_row + step * args.query_step + head * args.query_head;
    for (int64_t d = 0; d < args.key_size; ++d)
      scratch.query[d * kStride + c] = widen(query[d]) * static_cast<A>(args.scale);
  }

  const T* key = args.arena_key + args.offsets[block.prompt] * args.arena_key_slot + block.kv_head * args.arena_key_head;
  const T* value =
      args.arena_value + args.offsets[block.prompt] * args.arena_value_slot + block.kv_head * args.arena_value_head;
  for (int64_t begin = 0; begin < prefix; begin += kTileKeys) {
    attend_tile(args, scratch, visible, state, 0, block.count, key + begin * args.arena_key_slot, args.arena_key_slot,
                value + begin * args.arena_value_slot, args.arena_value_slot, begin, smaller(kTileKeys, prefix - begin));
  }
  for (int64_t c = 0; c < block.count;) {  // the columns of one row after the other's
    const int64_t column = block.first + c, row = block.rows[column / per_row];
    const int64_t columns = smaller(block.count - c, per_row - column % per_row);
    key = args.suffix_key + row * args.suffix_key_row + block.kv_head * args.suffix_key_head;
    value = args.suffix_value + row * args.suffix_value_row + block.kv_head * args.suffix_value_head;
    const int64_t used = args.suffix_len[row];
    for (int64_t begin = 0; begin < used; begin += kTileKeys) {
      attend_tile(args, scratch, visible, state, c, columns, key + begin * args.suffix_key_slot, args.suffix_key_slot,
                  value + begin * args.suffix_value_slot, args.suffix_value_slot, prefix + begin,
                  smaller(kTileKeys, used - begin));
    }
    c += columns;
  }

  for (int64_t c = 0; c < block.count; ++c) {
    const int64_t column = block.first + c, row = block.rows[column / per_row];
    const int64_t step = column % per_row / args.group, head = block.kv_head * args.group + column % args.group;
    A keep = 1, sum = state.sum[c];
    if (args.sinks != nullptr) {
      const A sink = static_cast<A>(args.sinks[head]), max = sink > state.max[c] ? sink : state.max[c];
      keep = __builtin_exp(state.max[c] - max);
      sum = sum * keep + static_cast<A>(__builtin_exp(sink - max));
    }
    T* out = args.out + ((row * args.steps + step) * heads + head) * args.value_size;
    const bool padded = step >= args.query_len[row];
    for (int64_t d = 0; d < args.value_size; ++d)
      narrow(padded ? A(0) : state.out[d * kStride + c] * keep / sum, out[d]);
  }
}

}  // namespace STARS_ISA
}  // namespace stars
