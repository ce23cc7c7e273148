// y = x W^T + b with bits that are each element's own: the same however many rows x has, wherever a row is among them, and
// whatever the threads; and the gradients dx = dy W and dW = dy^T x.  Formulas in kernels/linear.py.
//
// One operand is packed, its rows side by side, a row to a lane: x while it has few rows, so that the weight is read once and where it
// lies; W when x has many, so that x is.  A tile takes kLinearRows rows of the other operand, where they lie or widened, each element
// broadcast, and two vectors of the packed one; its sums run over blocks of kLinearDepth columns, whose bounds depend on K alone, so
// that which operand is packed does not show in the bits.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../check.h"
#include "../ops.h"

namespace fastrl {

constexpr int kLinearRows = 6;           // with two vectors 12 sums, 2 of x and one of the weight: 15 of AVX2's 16 registers
constexpr int64_t kLinearDepth = 128;    // columns summed in one go: short chains lose few digits; 3 KiB of weights and 8 KiB of x in L1
constexpr int64_t kLinearPitch = kLinearDepth + 16;  // not a multiple of 4096 bytes: the rows do not share a cache set

constexpr int64_t kLinearColumns = 16 * kLinearRows;  // of y with sums kept before they are written: whole cache lines of each row

struct LinearAhead {  // the part of the weight that comes next
  const char* at;
  int64_t stride, bytes, rows, offset;
  int each;  // cache lines asked for every 8 steps
};

struct LinearRows {  // by the type code of the operand, or of the output
  void (*pack[2])(float* out, const void* x, int64_t stride, int64_t M, int64_t K);
  void (*widen[2])(float* out, const void* w, int64_t stride, int64_t rows, int64_t depth);
  void (*tile[2])(float* sums, const float* w, int64_t pitch, const float* x, int64_t depth, bool first, LinearAhead& ahead);  // one vector, two
  void (*put[2])(void* y, int64_t stride, const float* sums, const float* bias, int64_t M, int64_t columns);
  void (*add)(void* y, int64_t stride, const float* sums, const float* bias, int64_t M, int64_t columns);
  void (*put_turned[2])(void* y, int64_t stride, const float* sums, const float* bias, int64_t M, int64_t columns);
  void (*columns)(float* out, const float* a, int64_t stride, int64_t depth, int64_t M);
  void (*flip)(float* out, const float* b, int64_t stride, int64_t depth, int64_t count);
  int64_t lanes;
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
  bool turned, across;  // whether y is (N, M), its bias (M,); whether x is (K, M)
};

struct Buffers {  // of a thread
  std::vector<float> x, sums, w;
};

// What the tiles ask for beside the block (n, k): the columns after it, or the first of the next rows.
LinearAhead after(const Product& p, int64_t n, int64_t k, int64_t end, int64_t panels) {
  const int64_t size = kSize[p.code], steps = panels * kLinearDepth / 8;
  const bool last = k + kLinearDepth >= p.K;
  const char* at = p.w + (last ? (n + kLinearRows) * p.w_stride : n * p.w_stride + k + kLinearDepth) * size;
  const int64_t bytes = std::min(kLinearDepth, last ? p.K : p.K - k - kLinearDepth) * size;
  const int64_t lines = last && n + kLinearRows >= end ? 0 : kLinearRows * ((bytes + 63) / 64);
  return {at, p.w_stride * size, bytes, kLinearRows - 1, 0, static_cast<int>((lines + steps - 1) / steps)};
}

// Columns [begin, end) of rows [m, m + M), which are packed in `b.x`.
void columns(const Product& p, Buffers& b, int64_t m, int64_t M, int64_t begin, int64_t end) {
  const int64_t panel = 2 * p.rows.lanes, panels = (M + panel - 1) / panel;
  static constexpr float zero[std::max(kLinearColumns, kMost)] = {};
  for (int64_t n = begin; n < end; n += kLinearRows) {
    const int64_t count = std::min<int64_t>(kLinearRows, end - n), done = (n - begin) % kLinearColumns;
    for (int64_t k = 0; k < p.K; k += kLinearDepth) {
      const int64_t depth = std::min(kLinearDepth, p.K - k);
      const bool in_place = p.code == kFloat32 && count == kLinearRows;
      const float* w = in_place ? reinterpret_cast<const float*>(p.w) + n * p.w_stride + k : b.w.data();
      if (!in_place) p.rows.widen[p.code](b.w.data(), p.w + (n * p.w_stride + k) * kSize[p.code], p.w_stride, count, depth);
      LinearAhead ahead = after(p, n, k, end, panels);
      for (int64_t i = 0; i < panels; i++) {
        const auto tile = p.rows.tile[M - i * panel > p.rows.lanes];
        float* sums = b.sums.data() + (i * kLinearColumns + done) * panel;
        tile(sums, w, in_place ? p.w_stride : kLinearPitch, b.x.data() + (i * p.K + k) * panel, depth, k == 0, ahead);
      }
    }
    if (done + count < kLinearColumns && n + count < end) continue;
    const int64_t first = n - done;
    char* y = p.y + (p.turned ? first * p.y_stride + m : m * p.y_stride + first) * kSize[p.out];
    const float* bias = p.bias ? p.bias + (p.turned ? m : first) : zero;
    (p.turned ? p.rows.put_turned : p.rows.put)[p.out](y, p.y_stride, b.sums.data(), bias, M, done + count);
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
  const int64_t width = ((p.N + shares - 1) / shares + kLinearRows - 1) / kLinearRows * kLinearRows;
  auto body = [&](int64_t begin, int64_t end) {
    static thread_local Buffers b;
    b.w.resize(kLinearRows * kLinearPitch);
    for (int64_t i = begin; i < end; i++) {
      const int64_t m = i / shares * most, from = i % shares * width;
      const int64_t rows = std::min(most, p.M - m), room = (rows + panel - 1) / panel * panel;
      if (from >= p.N) continue;
      b.x.resize(room * p.K);
      b.sums.assign(room * kLinearColumns, 0.0f);  // what a product over no columns is
      if (p.across) {
        p.rows.columns(b.x.data(), reinterpret_cast<const float*>(p.x) + m, p.x_stride, p.K, rows);
      } else {
        p.rows.pack[p.code](b.x.data(), p.x + m * p.x_stride * kSize[p.code], p.x_stride, rows, p.K);
      }
      columns(p, b, m, rows, from, std::min(p.N, from + width));
    }
  };
  parallel(chunks * shares, 1, threads, body);
}

// --- the gradient of the weight -----------------------------------------------------------------------
constexpr int64_t kLanes = 512;  // columns of a in a packed block of 256 KiB, while the columns of b pass by

struct Outer {
  const LinearRows& rows;
  float* y;
  int64_t y_stride;
  const float *a, *b;
  int64_t a_stride, b_stride, T, M, N;
  bool add;
};

// Columns [m, m + M) by [begin, end) of y; its sums stay in place while the blocks of T go by.
void outer(const Outer& p, Buffers& b, int64_t m, int64_t M, int64_t begin, int64_t end) {
  const int64_t panel = 2 * p.rows.lanes, panels = (M + panel - 1) / panel, group = panels * kLinearColumns * panel;
  static constexpr float zero[kLinearColumns] = {};
  LinearAhead nothing = {nullptr, 0, 0, 0, 0, 0};
  b.x.resize(panels * panel * kLinearDepth);
  b.sums.assign((end - begin + kLinearColumns - 1) / kLinearColumns * group, 0.0f);  // what a sum over no rows is
  for (int64_t t = 0; t < p.T; t += kLinearDepth) {
    const int64_t depth = std::min(kLinearDepth, p.T - t);
    p.rows.columns(b.x.data(), p.a + t * p.a_stride + m, p.a_stride, depth, M);
    for (int64_t n = begin; n < end; n += kLinearRows) {
      const int64_t at = n - begin;
      float* sums = b.sums.data() + at / kLinearColumns * group + at % kLinearColumns * panel;
      p.rows.flip(b.w.data(), p.b + t * p.b_stride + n, p.b_stride, depth, std::min<int64_t>(kLinearRows, end - n));
      for (int64_t i = 0; i < panels; i++) {
        const auto tile = p.rows.tile[M - i * panel > p.rows.lanes];
        tile(sums + i * kLinearColumns * panel, b.w.data(), kLinearPitch, b.x.data() + i * depth * panel, depth, t == 0, nothing);
      }
    }
  }
  for (int64_t n = begin; n < end; n += kLinearColumns) {
    const float* sums = b.sums.data() + (n - begin) / kLinearColumns * group;
    const auto put = p.add ? p.rows.add : p.rows.put[kFloat32];
    put(p.y + m * p.y_stride + n, p.y_stride, sums, zero, M, std::min(kLinearColumns, end - n));
  }
}

}  // namespace

void linear_forward_cpu(Address y, int64_t y_stride, int out, Address x, int64_t x_stride, Address w, int64_t w_stride, int code,
                        Address bias, int64_t M, int64_t N, int64_t K, int threads) {
  const LinearRows& rows = FASTRL_CHOOSE(kLinear);
  char* to = reinterpret_cast<char*>(y);
  const char *a = reinterpret_cast<const char*>(x), *b = reinterpret_cast<const char*>(w);
  const float* add = reinterpret_cast<const float*>(bias);
  const bool turned = M >= kMany;
  if (turned) {
    multiply({rows, to, y_stride, out, b, w_stride, a, x_stride, code, add, N, M, K, true, false}, threads);
  } else {
    multiply({rows, to, y_stride, out, a, x_stride, b, w_stride, code, add, M, N, K, false, false}, threads);
  }
}

void linear_input_grad_cpu(Address dx, int64_t dx_stride, Address dy, int64_t dy_stride, Address w, int64_t w_stride, int64_t T, int64_t N,
                           int64_t K, int threads) {
  multiply({FASTRL_CHOOSE(kLinear), reinterpret_cast<char*>(dx), dx_stride, kFloat32, reinterpret_cast<const char*>(w), w_stride,
            reinterpret_cast<const char*>(dy), dy_stride, kFloat32, nullptr, K, T, N, true, true}, threads);
}

void linear_weight_grad_cpu(Address y, int64_t y_stride, Address a, int64_t a_stride, Address b, int64_t b_stride, int64_t T, int64_t M,
                            int64_t N, bool add, int threads) {
  const Outer p{FASTRL_CHOOSE(kLinear), reinterpret_cast<float*>(y), y_stride, reinterpret_cast<const float*>(a),
                reinterpret_cast<const float*>(b), a_stride, b_stride, T, M, N, add};
  FASTRL_CHECK(T >= 0 && M >= 0 && N >= 0, "T, M, N", "at least 0", std::min({T, M, N}));
  FASTRL_CHECK(threads >= 1, "threads", "at least 1", threads);
  FASTRL_CHECK(M == 0 || N == 0 || (y && (T == 0 || (a && b))), "y, a, b", "addresses", "0");
  const int64_t chunks = (M + kLanes - 1) / kLanes, shares = chunks >= threads ? 1 : threads;  // of the columns of b
  const int64_t width = ((N + shares - 1) / shares + kLinearRows - 1) / kLinearRows * kLinearRows;
  auto body = [&](int64_t begin, int64_t end) {
    static thread_local Buffers buffers;
    buffers.w.resize(kLinearRows * kLinearPitch);
    for (int64_t i = begin; i < end; i++) {
      const int64_t m = i / shares * kLanes, from = i % shares * width;
      if (from < N) outer(p, buffers, m, std::min(kLanes, M - m), from, std::min(N, from + width));
    }
  };
  parallel(chunks * shares, 1, threads, body);
}

}  // namespace fastrl
