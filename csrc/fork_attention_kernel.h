// fork_attention for one block of columns (see ForkAttentionBlock): flash attention with the columns in the lanes.
//
// A row's keys are numbered through, from the start of its prefix on, its suffix following. They come in tiles of
// kTileKeys, so a tile may hold the end of the prefix and the start of each row's suffix. A tile's softmax is taken by
// itself, then merged into the state by log-sum-exp, in order. A column's arithmetic thus depends on nothing but its
// own query and keys: not on where the prefix ends, its neighbours, the block it is in, or the threads.
namespace stars {
namespace STARS_ISA {

// Room for full vectors from any column on: what is computed there belongs to no column and is dropped.
constexpr int64_t kStride = kBlockColumns + 16;
// Vectors side by side that fill the registers: 4 x 4 accumulators of 32 registers, or 4 x 2 of 16.
constexpr int kMaxVectors = STARS_VECTOR_BYTES == 64 ? 4 : 2;

// `product` of kRows rows and the columns of kVectors vectors, the last of them perhaps not a full one.
template <bool kTransposed, bool kAdd, int kRows, int kVectors, typename A>
STARS_INLINE void product_block(const A* a, int64_t stride, const A* b, A* c, int64_t columns, int64_t depth) {
  Vec<A> sum[kRows][kVectors] = {};
  if (kAdd) {
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVectors; ++v) sum[i][v] = load(c + i * kStride + v * kLanes<A>);
  }
#pragma GCC unroll 2  // the same order of sums, and less to do beside them
  for (int64_t t = 0; t < depth; ++t) {
    Vec<A> right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + t * kStride + v * kLanes<A>);
    for (int i = 0; i < kRows; ++i) {
      const Vec<A> left = broadcast(kTransposed ? a[t * stride + i] : a[i * stride + t]);
      for (int v = 0; v < kVectors; ++v) sum[i][v] = fma(left, right[v], sum[i][v]);
    }
  }
  const auto mine = lane_numbers<IntOf<A>>() < static_cast<IntOf<A>>(columns - (kVectors - 1) * kLanes<A>);
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) {
      A* const to = c + i * kStride + v * kLanes<A>;
      if (kAdd && v == kVectors - 1) sum[i][v] = mine ? sum[i][v] : load(to);
      store(to, sum[i][v]);
    }
}

template <bool kTransposed, bool kAdd, int kVectors, typename A>
inline void product_panel(const A* a, int64_t stride, const A* b, A* c, int64_t rows, int64_t columns, int64_t depth) {
  constexpr int kRows = kVectors == 1 ? 8 : 4;  // enough sums in flight to hide an fma's latency
  const int64_t row = kTransposed ? 1 : stride;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    product_block<kTransposed, kAdd, kRows, kVectors>(a + i * row, stride, b, c + i * kStride, columns, depth);
  if (kRows == 8 && i + 4 <= rows) {
    product_block<kTransposed, kAdd, 4, kVectors>(a + i * row, stride, b, c + i * kStride, columns, depth);
    i += 4;
  }
  a += i * row;
  c += i * kStride;
  switch (rows - i) {
    case 1: return product_block<kTransposed, kAdd, 1, kVectors>(a, stride, b, c, columns, depth);
    case 2: return product_block<kTransposed, kAdd, 2, kVectors>(a, stride, b, c, columns, depth);
    case 3: return product_block<kTransposed, kAdd, 3, kVectors>(a, stride, b, c, columns, depth);
  }
}

// c[i][j] = sum_t a[i][t] * b[t][j], or a[t][i], i < rows, j < columns, t < depth; b and c have rows of kStride. The
// rest of the last vector is overwritten. With kAdd it stays as it is, and the sums go on from what is there.
template <bool kTransposed, bool kAdd, typename A>
inline void product(const A* a, int64_t stride, const A* b, A* c, int64_t rows, int64_t columns, int64_t depth) {
  for (int64_t j = 0; j < columns; j += kMaxVectors * kLanes<A>) {
    const int64_t left = columns - j, vectors = (left + kLanes<A> - 1) / kLanes<A>;
    switch (vectors < kMaxVectors ? vectors : kMaxVectors) {
      case 1: product_panel<kTransposed, kAdd, 1>(a, stride, b + j, c + j, rows, left, depth); break;
      case 2: product_panel<kTransposed, kAdd, 2>(a, stride, b + j, c + j, rows, left, depth); break;
#if STARS_VECTOR_BYTES == 64
      case 3: product_panel<kTransposed, kAdd, 3>(a, stride, b + j, c + j, rows, left, depth); break;
      case 4: product_panel<kTransposed, kAdd, 4>(a, stride, b + j, c + j, rows, left, depth); break;
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

// Which keys a column sees: [low, high).
template <typename A>
struct Visible {
  IntOf<A> low[kStride], high[kStride];
};

// Keys [begin, end), which lie in one place, and columns [first, first + columns), which see none outside [low, high).
template <typename T>
struct Part {
  int64_t begin, end, first, columns, low, high;
  const T* key;
  int64_t key_stride;
  const T* value;
  int64_t value_stride;
};

// A block's prefix with all its columns, then the suffix of each row that has queries, from left to right.
template <typename T>
struct Parts {
  Part<T> part[1 + kBlockColumns];
  int64_t count;
};

STARS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
STARS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// How many keys of the tile that begins at `tile` are the part's, the first of them being `from`; 0 where its columns
// see none of the tile.
template <typename T>
STARS_INLINE int64_t keys_in_tile(const Part<T>& part, int64_t tile, int64_t& from) {
  from = larger(tile, part.begin);
  if (part.high <= tile || tile + kTileKeys <= part.low) return 0;
  return larger(0, smaller(tile + kTileKeys, part.end) - from);
}

// A block's columns over the tile that begins at key `tile`.
template <typename A, typename T>
inline void attend_tile(const ForkAttentionArgs<T>& args, const Scratch<A>& scratch, const Visible<A>& visible,
                        State<A>& state, const Parts<T>& parts, int64_t tile) {
  using Int = IntOf<A>;
  constexpr int64_t kLane = kLanes<A>;
  const int64_t columns = parts.part[0].columns;
  A* const scores = scratch.scores;
  int64_t count = 0;
  for (int64_t p = 0; p < parts.count; ++p) {
    const Part<T>& part = parts.part[p];
    int64_t from;
    const int64_t keys = keys_in_tile(part, tile, from);
    if (keys == 0) continue;
    int64_t stride = part.key_stride;
    const A* key = widen_rows(part.key + (from - part.begin) * stride, keys, args.key_size, scratch.keys, stride);
    product<false, false>(key, stride, scratch.query + part.first, scores + (from - tile) * kStride + part.first, keys,
                          part.columns, args.key_size);
    count = larger(count, from + keys - tile);
  }
  if (count == 0) return;

  bool all = true;
  for (int64_t c = 0; c < columns; ++c) all &= visible.low[c] <= tile && tile + count <= visible.high[c];
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
    if (!all) {  // the scores of keys that its row does not have are anything
      const Vec<Int> low = load(visible.low + c), high = load(visible.high + c);
      for (int64_t i = 0; i < count; ++i) {
        const auto at = broadcast(static_cast<Int>(tile + i));
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
  for (int64_t p = 0; p < parts.count; ++p) {
    const Part<T>& part = parts.part[p];
    int64_t from;
    const int64_t keys = keys_in_tile(part, tile, from);
    if (keys == 0) continue;
    int64_t stride = part.value_stride;
    const A* value =
        widen_rows(part.value + (from - part.begin) * stride, keys, args.value_size, scratch.values, stride);
    const A* const weights = scores + (from - tile) * kStride + part.first;
    A* const out = scratch.tile_out + part.first;
    if (from == tile) {
      product<true, false>(value, stride, weights, out, args.value_size, part.columns, keys);
      continue;
    }
    for (int64_t c = 0; c < part.columns; ++c) {  // who sees no key before: their values may be infinite
      if (visible.low[part.first + c] < from) continue;
      for (int64_t d = 0; d < args.value_size; ++d) out[d * kStride + c] = 0;
    }
    product<true, true>(value, stride, weights, out, args.value_size, part.columns, keys);
  }

  for (int64_t c = 0; c < columns; c += kLane) {
    const Vec<A> before = load(state.max + c), largest = load(maxima + c), tile_sum = load(sums + c);
    // The other lanes are nobody's, or see none of these keys, whose values may be infinite.
    const auto mine = (lane_numbers<Int>() < static_cast<Int>(columns - c)) & (tile_sum != static_cast<A>(0));
    const Vec<A> max = maximum(before, largest);
    const Vec<A> shift = max == static_cast<A>(-__builtin_inff()) ? Vec<A>{} : max;
    const Vec<A> keep = exp_nonpositive(before - shift), add = exp_nonpositive(largest - shift);
    const Vec<A> sum = load(state.sum + c);
    store(state.max + c, mine ? max : before);
    store(state.sum + c, mine ? fma(sum, keep, tile_sum * add) : sum);
    for (int64_t d = 0; d < args.value_size; ++d) {
      const Vec<A> out = load(state.out + d * kStride + c);
      const Vec<A> merged = fma(out, keep, load(scratch.tile_out + d * kStride + c) * add);
      store(state.out + d * kStride + c, mine ? merged : out);
    }
  }
}

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

  Parts<T> parts;
  parts.count = 1;
  Part<T>& shared = parts.part[0];
  const int64_t offset = args.offsets[block.prompt];
  shared = {
      .begin = 0,
      .end = prefix,
      .first = 0,
      .columns = block.count,
      .low = INT64_MAX,
      .high = 0,
      .key = args.arena_key + offset * args.arena_key_slot + block.kv_head * args.arena_key_head,
      .key_stride = args.arena_key_slot,
      .value = args.arena_value + offset * args.arena_value_slot + block.kv_head * args.arena_value_head,
      .value_stride = args.arena_value_slot,
  };
  for (int64_t c = 0; c < block.count;) {  // the columns of one row after the other's
    const int64_t column = block.first + c, row = block.rows[column / per_row];
    const int64_t columns = smaller(block.count - c, per_row - column % per_row);
    const int64_t low = visible.low[c];  // the first step's, and padding comes last
    int64_t high = 0;
    for (int64_t i = c; i < c + columns; ++i) high = larger(high, visible.high[i]);
    if (high > 0) {
      shared.low = smaller(shared.low, low);
      shared.high = larger(shared.high, high);
      parts.part[parts.count++] = {
          .begin = prefix,
          .end = prefix + args.suffix_len[row],
          .first = c,
          .columns = columns,
          .low = low,
          .high = high,
          .key = args.suffix_key + row * args.suffix_key_row + block.kv_head * args.suffix_key_head,
          .key_stride = args.suffix_key_slot,
          .value = args.suffix_value + row * args.suffix_value_row + block.kv_head * args.suffix_value_head,
          .value_stride = args.suffix_value_slot,
      };
    }
    c += columns;
  }
  for (int64_t tile = shared.low / kTileKeys * kTileKeys; tile < shared.high; tile += kTileKeys)
    attend_tile(args, scratch, visible, state, parts, tile);

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
