// Root-mean-square norm of each row, with the residual addition before it, and the gradients; formulas in kernels/rms_norm.py.
//
// The weight's gradient is summed over blocks of rows whose bounds depend on T alone, then over the blocks in their order: the
// same bits for every number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../check.h"
#include "../ops.h"

namespace fastrl {

struct NormRows {  // the row functions of one element type; pointers to rows, `residual`, `h` and `dh` may be null together
  double (*squares)(const void* x, const void* residual, void* h, int64_t D);
  void (*scale)(void* y, const void* h, const float* weight, float r, int64_t D);
  double (*products)(const void* dy, const void* h, const float* weight, float* dw, float r, int64_t D);
  void (*gradients)(void* dx, const void* dy, const void* dh, const void* h, const float* weight, float r, float mean, int64_t D);
  int64_t bytes;  // of an element
};

}  // namespace fastrl

#define FASTRL_ROWS "rms_norm_rows.h"
#include "foreach_target.h"

namespace fastrl {
namespace {

constexpr int64_t kBlocks = 256, kRows = 32;  // at most so many blocks, of at least so many rows: few partials, short fp32 sums

void check(int code, int64_t T, int64_t D, int threads) {
  FASTRL_CHECK(code == kFloat32 || code == kBFloat16, "code", "0 (fp32) or 1 (bf16)", code);
  FASTRL_CHECK(T >= 0, "T", "at least 0", T);
  FASTRL_CHECK(D >= 1, "D", "at least 1", D);
  FASTRL_CHECK(threads >= 1, "threads", "at least 1", threads);
}

template <class T>
T* array(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void rms_norm_forward_cpu(Address y, Address h, Address r, Address x, int64_t x_stride, Address residual, int64_t residual_stride,
                          int code, Address weight, double eps, int64_t T, int64_t D, int threads) {
  check(code, T, D, threads);
  FASTRL_CHECK(T == 0 || (y && r && x && weight), "y, r, x, weight", "addresses", "0");
  FASTRL_CHECK(!residual == !h, "h", "an address exactly where residual has one", h);
  const NormRows& rows = FASTRL_CHOOSE(kNormRows)[code];
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const char* from = array<const char>(x) + t * x_stride * rows.bytes;
      const char* other = residual ? array<const char>(residual) + t * residual_stride * rows.bytes : nullptr;
      char* sum = h ? array<char>(h) + t * D * rows.bytes : nullptr;
      const double squares = rows.squares(from, other, sum, D);
      const float inverse = static_cast<float>(1 / std::sqrt(squares / D + eps));
      array<float>(r)[t] = inverse;
      rows.scale(array<char>(y) + t * D * rows.bytes, sum ? sum : from, array<const float>(weight), inverse, D);
    }
  };
  parallel(T, 1 + 16384 / D, threads, body);
}

void rms_norm_backward_cpu(Address dx, Address dw, Address dy, int64_t dy_stride, Address dh, int64_t dh_stride, Address x,
                           int64_t x_stride, int code, Address weight, Address r, int64_t T, int64_t D, int threads) {
  check(code, T, D, threads);
  FASTRL_CHECK(dw != 0, "dw", "an address", "0");
  FASTRL_CHECK(T == 0 || (dx && dy && x && weight && r), "dx, dy, x, weight, r", "addresses", "0");
  const NormRows& rows = FASTRL_CHOOSE(kNormRows)[code];
  const int64_t each = std::max(kRows, (T + kBlocks - 1) / kBlocks), blocks = (T + each - 1) / each;
  std::vector<float> partials(blocks * D);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      float* part = partials.data() + b * D;
      for (int64_t t = b * each; t < std::min(T, (b + 1) * each); t++) {
        const char* up = array<const char>(dy) + t * dy_stride * rows.bytes;
        const char* from = array<const char>(x) + t * x_stride * rows.bytes;
        const char* more = dh ? array<const char>(dh) + t * dh_stride * rows.bytes : nullptr;
        const float inverse = array<const float>(r)[t];
        const double sum = rows.products(up, from, array<const float>(weight), part, inverse, D);
        const float mean = static_cast<float>(sum / D * inverse * inverse);
        rows.gradients(array<char>(dx) + t * D * rows.bytes, up, more, from, array<const float>(weight), inverse, mean, D);
      }
    }
  };
  parallel(blocks, 1, threads, body);
  for (int64_t d = 0; d < D; d++) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; b++) sum += partials[b * D + d];
    array<float>(dw)[d] = static_cast<float>(sum);
  }
}

}  // namespace fastrl
