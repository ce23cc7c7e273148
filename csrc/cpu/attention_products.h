// The products of attention's tiles, held in registers.  Beside vec.h, under the same rules.

namespace tiles {

#ifdef __clang__
#define FASTRL_UNROLL _Pragma("unroll")
#else
#define FASTRL_UNROLL _Pragma("GCC unroll 16")
#endif

constexpr long kPanel = 2 * LANES;                 // keys side by side, one a lane
constexpr long kBlock = LANES == 16 ? 12 : 6;      // rows of a product held in registers, with two vectors each
constexpr long kScores = kAttentionKeys + 16;      // from one row of scores to the next: a multiple of 4096 bytes would share cache sets
constexpr long kWide = kAttentionWidth + 16;       // from one row of q, y, dy or dq to the next

constexpr long kDepth = LANES == 4 ? 32 : 64;      // of a head's width summed in one go: short chains, without fused products too, lose few digits

// --- products -----------------------------------------------------------------------------------------
enum Mode { kSet, kAdd, kFade };

// c (R, V LANES) = a b, or c + a b, or c faded + a b, with a (R, depth) and b (depth, V LANES).  Every element is one chain over the
// depth, whatever the tile.  TURNED: a is stored (depth, R).
template <int R, int V, Mode MODE, bool TURNED, long PITCH>
void product(float* c, long c_pitch, const float* a, const float* b, long b_pitch, long depth, const float* faded) {
  F acc[R][V] = {};
  for (long k = 0; k < depth; k++, b += b_pitch) {
    F in[V];
    FASTRL_UNROLL
    for (int v = 0; v < V; v++) in[v] = load(b + v * LANES);
    FASTRL_UNROLL
    for (int r = 0; r < R; r++) {
      const F x = splat(TURNED ? a[k * PITCH + r] : a[r * PITCH + k]);
      FASTRL_UNROLL
      for (int v = 0; v < V; v++) acc[r][v] += x * in[v];
    }
  }
  FASTRL_UNROLL
  for (int r = 0; r < R; r++, c += c_pitch) {
    FASTRL_UNROLL
    for (int v = 0; v < V; v++) {
      const F before = MODE == kSet ? F{} : load(c + v * LANES);
      store(c + v * LANES, MODE == kSet ? acc[r][v] : MODE == kAdd ? before + acc[r][v] : before * faded[r] + acc[r][v]);
    }
  }
}

// The same over `columns` of c, a multiple of LANES; `panel` elements lie between two panels of b.
template <int R, Mode MODE, bool TURNED, long PITCH>
INLINE void strip(float* c, long c_pitch, const float* a, const float* b, long b_pitch, long panel, long depth, long columns,
                  const float* faded) {
  for (; columns >= kPanel; columns -= kPanel, c += kPanel, b += panel) {
    product<R, 2, MODE, TURNED, PITCH>(c, c_pitch, a, b, b_pitch, depth, faded);
  }
  if (columns > 0) product<R, 1, MODE, TURNED, PITCH>(c, c_pitch, a, b, b_pitch, depth, faded);
}
template <Mode MODE, bool TURNED, long PITCH>
INLINE void strip(long rows, float* c, long c_pitch, const float* a, const float* b, long b_pitch, long panel, long depth, long columns,
                  const float* faded) {
  const auto run = rows == kBlock ? strip<kBlock, MODE, TURNED, PITCH>
                   : rows == 4    ? strip<4, MODE, TURNED, PITCH>
                                  : strip<1, MODE, TURNED, PITCH>;
  run(c, c_pitch, a, b, b_pitch, panel, depth, columns, faded);
}
INLINE long block_of(long left) { return left >= kBlock ? kBlock : left >= 4 ? 4 : 1; }
INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long whole(long n) { return (n + LANES - 1) / LANES * LANES; }

}  // namespace tiles
