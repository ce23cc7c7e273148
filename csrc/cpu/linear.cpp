// y = x W^T + b with bits that are each element's own: the same however many rows x has, wherever a row is among them, and
// whatever the threads; and the gradients dx = dy W and dW = dy^T x.  Formulas in kernels/linear.py.
//
// One operand is packed, its rows side by side, a row to a lane: x while it has few rows, so that the weight is read once and where it
// lies; W when x has many, so that x is.  A tile takes a few rows of the other operand, where they lie or widened, each element
// broadcast, and two vectors of the packed one; its sums run over blocks of kLinearDepth columns, whose bounds depend on K alone, so
// that which operand is packed does not show in the bits.
#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "../check.h"
#include "../ops.h"

namespace fastrl {

constexpr int kLinearMostRows = 12;    // of a tile, on the widest instruction set
constexpr int64_t kLinearDepth = 128;  // columns summed in one go: short chains lose few digits; a tile's operands fit into L1
constexpr int64_t kLinearPitch = kLinearDepth + 16;  // not a multiple of 4096 bytes: the rows do not share a cache set

constexpr int64_t kLinearColumns = 8 * kLinearMostRows;  // of y with sums kept before they are written: whole cache lines of each row

struct LinearAhead {  // the part of the weight that comes next
  const char* at;
  int64_t stride, bytes, rows, offset;
  int each;  // cache lines asked for every 8 steps
};

struct LinearOut {  // rows of outputs, a lane each, that a tile writes instead of keeping its sums
  void* at;
  int64_t stride, lanes;
  int rows;
  const float* bias;  // of the first lane, or null
  bool add;           // to what is there
};

using LinearTile = void (*)(float* sums, const float* w, int64_t pitch, const float* x, int64_t x_pitch, int64_t depth, bool first,
                            LinearAhead& ahead, const LinearOut* out);
struct LinearTiles {
  LinearTile of[2][2];  // half of a tile's rows, or all; one vector, or two
};

struct LinearRows {  // by the type code of the operand, or of the output
  void (*pack[2])(float* out, const void* x, int64_t stride, int64_t M, int64_t K);
  void (*widen[2])(float* out, const void* w, int64_t stride, int64_t rows, int64_t depth);
  LinearTiles tile[2];
  void (*put[2])(void* y, int64_t stride, const float* sums, const float* bias, int64_t M, int64_t columns);
  void (*columns)(float* out, const float* a, int64_t stride, int64_t depth, int64_t M);
  void (*flip)(float* out, const float* b, int64_t stride, int64_t depth, int64_t count);
  int64_t lanes, tile_rows;
};

}  // namespace fastrl

#define FASTRL_ROWS "linear_rows.h"
#include "foreach_target.h"

namespace fastrl {
namespace {

constexpr int64_t kPacked = 1 << 17;  // floats of x packed at once, if that makes from kFewest to kMost rows: half of a 1 MiB L2
constexpr int64_t kFewest = 64, kMost = 128;  // rows: fewer read the weight too often, the stores of more miss the cache
constexpr int64_t kMany = 256;  // rows of x from which those of the weight are packed instead
constexpr int64_t kSize[2] = {4, 2};  // bytes, by type code

struct Product {  // of x, which is packed, and w, which streams by
  const LinearRows& rows;
  char* y;
  int64_t y_stride;
  int out;
  const char* x;
  int64_t x_stride;
  const char* w;
  int64_t w_stride;
  int code;
  const float* bias;
  int64_t M, N, K;
  bool turned;  // whether y is (N, M), its bias (M,)
};

// A vector that begins where a cache line does: a load that crosses two lines costs two.
template <class T>
struct WholeLines {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, std::size_t) { ::operator delete(p, kLine); }
  bool operator==(const WholeLines&) const { return true; }
  bool operator!=(const WholeLines&) const { return false; }
};
using Floats = std::vector<float, WholeLines<float>>;

struct Buffers {  // of a thread
  Floats x, sums, w;
};

// What the tiles ask for beside the block (n, k): the columns after it, or the first of the next rows.
LinearAhead after(const Product& p, int64_t n, int64_t k, int64_t end, int64_t panels) {
  const int64_t size = kSize[p.code], steps = panels * kLinearDepth / 8;
  const bool last = k + kLinearDepth >= p.K;
  const char* at = p.w + (last ? (n + p.rows.tile_rows) * p.w_stride : n * p.w_stride + k + kLinearDepth) * size;
  const int64_t bytes = std::min(kLinearDepth, last ? p.K : p.K - k - kLinearDepth) * size;
  const int64_t lines = last && n + p.rows.tile_rows >= end ? 0 : p.rows.tile_rows * ((bytes + 63) / 64);
  return {at, p.w_stride * size, bytes, p.rows.tile_rows - 1, 0, static_cast<int>((lines + steps - 1) / steps)};
}

// Columns [begin, end) of rows [m, m + M), which are packed in `b.x`.
void columns(const Product& p, Buffers& b, int64_t m, int64_t M, int64_t begin, int64_t end) {
  const int64_t panel = 2 * p.rows.lanes, panels = (M + panel - 1) / panel;
  static constexpr float zero[kLinearColumns] = {};
  for (int64_t n = begin; n < end; n += p.rows.tile_rows) {
    const int64_t count = std::min(p.rows.tile_rows, end - n), done = p.turned ? 0 : (n - begin) % kLinearColumns;
    const bool whole = 2 * count > p.rows.tile_rows;
    LinearOut out = {nullptr, p.y_stride, 0, static_cast<int>(count), nullptr, false};
    for (int64_t k = 0; k < p.K; k += kLinearDepth) {
      const int64_t depth = std::min(kLinearDepth, p.K - k);
      const bool in_place = p.code == kFloat32 && count == p.rows.tile_rows, last = p.turned && k + depth == p.K;
      const float* w = in_place ? reinterpret_cast<const float*>(p.w) + n * p.w_stride + k : b.w.data();
      if (!in_place) p.rows.widen[p.code](b.w.data(), p.w + (n * p.w_stride + k) * kSize[p.code], p.w_stride, count, depth);
      LinearAhead ahead = after(p, n, k, end, panels);
      for (int64_t i = 0; i < panels; i++) {
        const int64_t lane = i * panel;
        const auto tile = p.rows.tile[p.out].of[whole][M - lane > p.rows.lanes];
        out.at = p.y + (n * p.y_stride + m + lane) * kSize[p.out];
        out.lanes = M - lane;
        out.bias = p.bias ? p.bias + m + lane : nullptr;
        float* sums = b.sums.data() + (i * kLinearColumns + done) * panel;
        const float* x = b.x.data() + (i * p.K + k) * panel;
        tile(sums, w, in_place ? p.w_stride : kLinearPitch, x, panel, depth, k == 0, ahead, last ? &out : nullptr);
      }
    }
    if (p.turned || (done + count < kLinearColumns && n + count < end)) continue;
    const int64_t first = n - done;
    char* y = p.y + (m * p.y_stride + first) * kSize[p.out];
    p.rows.put[p.out](y, p.y_stride, b.sums.data(), p.bias ? p.bias + first : zero, M, done + count);
  }
}

void check(const Product& p, int threads) {
  FASTRL_CHECK(p.code == kFloat32 || p.code == kBFloat16, "code", "0 (fp32) or 1 (bf16)", p.code);
  FASTRL_CHECK(p.out == kFloat32 || p.out == p.code, "out", "0 (fp32), or the code of the operands", p.out);
  FASTRL_CHECK(p.M >= 0 && p.N >= 0 && p.K >= 0, "M, N, K", "at least 0", std::min({p.M, p.N, p.K}));
  FASTRL_CHECK(threads >= 1, "threads", "at least 1", threads);
  FASTRL_CHECK(p.M == 0 || p.N == 0 || (p.y && (p.K == 0 || (p.x && p.w))), "y, x, w", "addresses", "0");
}

void multiply(const Product& p, int threads) {
  check(p, threads);
  const int64_t panel = 2 * p.rows.lanes, fits = kPacked / std::max<int64_t>(p.K, 1) / panel * panel;
  const int64_t most = std::clamp(fits, kFewest, kMost), chunks = (p.M + most - 1) / most;
  const int64_t shares = chunks >= threads ? 1 : threads;  // of the columns
  const int64_t width = ((p.N + shares - 1) / shares + p.rows.tile_rows - 1) / p.rows.tile_rows * p.rows.tile_rows;
  auto body = [&](int64_t begin, int64_t end) {
    static thread_local Buffers b;
    b.w.resize(kLinearMostRows * kLinearPitch);
    for (int64_t i = begin; i < end; i++) {
      const int64_t m = i / shares * most, from = i % shares * width;
      const int64_t rows = std::min(most, p.M - m), room = (rows + panel - 1) / panel * panel;
      if (from >= p.N) continue;
      b.x.resize(room * p.K);
      b.sums.assign(room * kLinearColumns, 0.0f);  // what a product over no columns is
      p.rows.pack[p.code](b.x.data(), p.x + m * p.x_stride * kSize[p.code], p.x_stride, rows, p.K);
      columns(p, b, m, rows, from, std::min(p.N, from + width));
    }
  };
  parallel(chunks * shares, 1, threads, body);
}

// --- products that go by blocks of what is summed over --------------------------------------------------
constexpr int64_t kLanes = 512;  // columns of a in a packed block, which stays in the L2 cache while the rows of b pass by
constexpr int64_t kFew = 32;     // rows of b that do not pay for packing: a is read where it lies
constexpr int64_t kPass = 2 * kLinearDepth;  // rows of a in such a block: the sums, which may not fit there, are read once a pass

struct Blocked {  // y (N, M) = b a, of b (N, T), or of b (T, N) turned, and a (T, M)
  const LinearRows& rows;
  float* y;
  int64_t y_stride;
  const float *a, *b;
  int64_t a_stride, b_stride, T, M, N;
  bool turned, add;  // whether b is (T, N); whether y is added to
};

// `count` rows of b from n on, columns t to t + depth, as they lie or in the buffer w.
const float* broadcast(const Blocked& p, float* w, int64_t& pitch, int64_t n, int64_t count, int64_t t, int64_t depth) {
  if (p.turned) p.rows.flip(w, p.b + t * p.b_stride + n, p.b_stride, depth, count);
  else if (count < p.rows.tile_rows) p.rows.widen[kFloat32](w, p.b + n * p.b_stride + t, p.b_stride, count, depth);
  const bool in_place = !p.turned && count == p.rows.tile_rows;
  pitch = in_place ? p.b_stride : kLinearPitch;
  return in_place ? p.b + n * p.b_stride + t : w;
}

// Columns [m, m + M) by rows [begin, end) of y; its sums stay in place while the passes over T go by.
void blocked(const Blocked& p, Buffers& b, int64_t m, int64_t M, int64_t begin, int64_t end) {
  const int64_t panel = 2 * p.rows.lanes, panels = (M + panel - 1) / panel, most = p.rows.tile_rows;
  const int64_t packed = p.N <= kFew ? M / panel * panel : 0;  // the first column that is packed
  b.x.resize((panels * panel - packed) * kPass);
  if (p.T > kPass) b.sums.resize((end - begin + most - 1) / most * panels * most * panel);
  else b.sums.resize(most * panel);

  for (int64_t t = 0; t < p.T; t += kPass) {
    const int64_t pass = std::min(kPass, p.T - t);
    if (packed < M) p.rows.columns(b.x.data(), p.a + t * p.a_stride + m + packed, p.a_stride, pass, M - packed);
    const int64_t next = std::min(kPass, p.T - t - pass), lines = next * ((M * 4 + 63) / 64);
    const int64_t steps = (end - begin + most - 1) / most * panels * ((pass + 7) / 8);
    const char* from = reinterpret_cast<const char*>(p.a + (t + pass) * p.a_stride + m);
    LinearAhead ahead = {from, p.a_stride * 4, M * 4, next - 1, 0, static_cast<int>((lines + steps - 1) / steps)};
    for (int64_t n = begin; n < end; n += most) {
      const int64_t count = std::min(most, end - n);
      int64_t pitch[kPass / kLinearDepth];
      const float* w[kPass / kLinearDepth];
      for (int64_t k = 0; k < pass; k += kLinearDepth) {
        const int64_t i = k / kLinearDepth, depth = std::min(kLinearDepth, pass - k);
        w[i] = broadcast(p, b.w.data() + i * kLinearMostRows * kLinearPitch, pitch[i], n, count, t + k, depth);
      }
      for (int64_t i = 0; i < panels; i++) {
        const int64_t lane = i * panel;
        const auto tile = p.rows.tile[kFloat32].of[2 * count > most][M - lane > p.rows.lanes];
        const LinearOut out = {p.y + n * p.y_stride + m + lane, p.y_stride, M - lane, static_cast<int>(count), nullptr, p.add};
        const bool in_place = lane < packed;
        float* sums = p.T > kPass ? b.sums.data() + ((n - begin) / most * panels + i) * most * panel : b.sums.data();
        for (int64_t k = 0; k < pass; k += kLinearDepth) {
          const int64_t depth = std::min(kLinearDepth, pass - k);
          const float* x = in_place ? p.a + (t + k) * p.a_stride + m + lane : b.x.data() + (lane - packed) * pass + k * panel;
          const LinearOut* to = t + k + depth == p.T ? &out : nullptr;
          const int64_t j = k / kLinearDepth, x_pitch = in_place ? p.a_stride : panel;
          tile(sums, w[j], pitch[j], x, x_pitch, depth, t + k == 0, ahead, to);
        }
      }
    }
  }
}

// `sizes` and `arrays` are what the caller calls them.
void multiply(const Blocked& p, int threads, const char* sizes, const char* arrays) {
  FASTRL_CHECK(p.T >= 0 && p.M >= 0 && p.N >= 0, sizes, "at least 0", std::min({p.T, p.M, p.N}));
  FASTRL_CHECK(threads >= 1, "threads", "at least 1", threads);
  FASTRL_CHECK(p.M == 0 || p.N == 0 || (p.y && (p.T == 0 || (p.a && p.b))), arrays, "addresses", "0");
  for (int64_t n = 0; p.T == 0 && !p.add && n < p.N; n++) std::fill_n(p.y + n * p.y_stride, p.M, 0.0f);  // a sum over nothing
  const int64_t chunks = (p.M + kLanes - 1) / kLanes, shares = chunks >= threads ? 1 : threads;  // of the rows of b
  const int64_t most = p.rows.tile_rows, width = ((p.N + shares - 1) / shares + most - 1) / most * most;
  auto body = [&](int64_t begin, int64_t end) {
    static thread_local Buffers buffers;
    buffers.w.resize(kPass / kLinearDepth * kLinearMostRows * kLinearPitch);
    for (int64_t i = begin; i < end; i++) {
      const int64_t m = i / shares * kLanes, from = i % shares * width;
      if (from < p.N) blocked(p, buffers, m, std::min(kLanes, p.M - m), from, std::min(p.N, from + width));
    }
  };
  parallel(chunks * shares, 1, threads, body);
}

}  // namespace

void linear_forward_cpu(Address y, int64_t y_stride, int out, Address x, int64_t x_stride, Address w, int64_t w_stride, int code,
                        Address bias, int64_t M, int64_t N, int64_t K, int threads) {
  const LinearRows& rows = FASTRL_CHOOSE(kLinear);
  char* to = reinterpret_cast<char*>(y);
  const char *a = reinterpret_cast<const char*>(x), *b = reinterpret_cast<const char*>(w);
  const float* add = reinterpret_cast<const float*>(bias);
  const bool turned = M >= kMany && K > 0;
  if (turned) {
    multiply({rows, to, y_stride, out, b, w_stride, a, x_stride, code, add, N, M, K, true}, threads);
  } else {
    multiply({rows, to, y_stride, out, a, x_stride, b, w_stride, code, add, M, N, K, false}, threads);
  }
}

void linear_input_grad_cpu(Address dx, int64_t dx_stride, Address dy, int64_t dy_stride, Address w, int64_t w_stride, int64_t T, int64_t N,
                           int64_t K, int threads) {
  const float *a = reinterpret_cast<const float*>(w), *b = reinterpret_cast<const float*>(dy);
  const Blocked p{FASTRL_CHOOSE(kLinear), reinterpret_cast<float*>(dx), dx_stride, a, b, w_stride, dy_stride, N, K, T, false, false};
  multiply(p, threads, "M, N, K", "y, x, w");
}

void linear_weight_grad_cpu(Address y, int64_t y_stride, Address a, int64_t a_stride, Address b, int64_t b_stride, int64_t T, int64_t M,
                            int64_t N, bool add, int threads) {
  const float *rows = reinterpret_cast<const float*>(a), *lanes = reinterpret_cast<const float*>(b);
  const Blocked p{FASTRL_CHOOSE(kLinear), reinterpret_cast<float*>(y), y_stride, lanes, rows, b_stride, a_stride, T, N, M, true, add};
  multiply(p, threads, "T, M, N", "y, a, b");
}

}  // namespace fastrl
