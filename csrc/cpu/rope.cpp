// Queries and keys normalised head by head and turned by their positions' angles, and the gradients; formulas in kernels/rope.py.
//
// A norm weight's gradient is summed over the heads of a token, over blocks of tokens whose bounds depend on T alone, then over the
// blocks in their order: the same bits for every number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "../check.h"
#include "../ops.h"

namespace fastrl {

struct Turn {  // of one token
  const float *cos, *sin;
  float sense;  // 1, or -1 to turn back
  int64_t half;
};

struct RopeRows {  // the functions of one head; without a norm, weight is null
  double (*squares)(const void* x, int64_t width);
  void (*turn)(void* y, const void* x, const Turn& turn, const float* weight, float r);
  void (*gradients)(void* dx, float* dw, const void* dy, const void* x, const Turn& turn, const float* weight, float r);
  int64_t bytes;  // of an element
};

}  // namespace fastrl

#define FASTRL_ROWS "rope_rows.h"
#include "foreach_target.h"

namespace fastrl {
namespace {

constexpr int64_t kBlocks = 256, kTokens = 32;  // at most so many blocks, of at least so many tokens

template <class T>
T* array(Address address) {
  return reinterpret_cast<T*>(address);
}

struct Heads {  // (T, count, E) at an address, with strides
  Address at;
  int64_t token, head, count;
  template <class T>
  T* of(int64_t t, int64_t h, int64_t bytes) const {
    return reinterpret_cast<T*>(at + (t * token + h * head) * bytes);
  }
};

// Everything that is read or written through, before any thread does so.
void check_range(const char* name, const int64_t* x, int64_t T, int64_t end) {
  if (T == 0) return;
  const auto [least, most] = std::minmax_element(x, x + T);
  FASTRL_CHECK(*least >= 0 && *most < end, name, "values in [0, " + std::to_string(end) + ")",
               std::to_string(*least) + " to " + std::to_string(*most));
}

void check(int code, int64_t T, int64_t H, int64_t K, int64_t E, int threads) {
  FASTRL_CHECK(code == kFloat32 || code == kBFloat16, "code", "0 (fp32) or 1 (bf16)", code);
  FASTRL_CHECK(T >= 0 && H >= 0 && K >= 0, "T, H, K", "at least 0", std::min({T, H, K}));
  FASTRL_CHECK(E >= 2 && E % 2 == 0, "E", "an even width", E);
  FASTRL_CHECK(threads >= 1, "threads", "at least 1", threads);
}

float inverse(const RopeRows& rows, const void* x, int64_t E, double eps) {
  return static_cast<float>(1 / std::sqrt(rows.squares(x, E) / E + eps));
}

}  // namespace

void rope_forward_cpu(Address yq, Address yk, Address q, int64_t q_token, int64_t q_head, Address k, int64_t k_token, int64_t k_head,
                      int code, Address positions, Address cos, Address sin, int64_t N, Address q_norm, Address k_norm, double eps,
                      double sense, Address v, int64_t v_token, int64_t v_head, Address k_cache, Address v_cache, Address slots,
                      int64_t cache_rows, int64_t T, int64_t H, int64_t K, int64_t E, int threads) {
  check(code, T, H, K, E, threads);
  FASTRL_CHECK(T == 0 || (yq && yk && q && k && positions && cos && sin), "yq, yk, q, k, positions, cos, sin", "addresses", "0");
  FASTRL_CHECK(!v || (k_cache && v_cache && slots), "k_cache, v_cache, slots", "addresses beside v", "0");
  check_range("positions", array<const int64_t>(positions), T, N);
  if (v) check_range("store.slots", array<const int64_t>(slots), T, cache_rows);
  const RopeRows& rows = FASTRL_CHOOSE(kRopeRows)[code];
  const Heads from[2] = {{q, q_token, q_head, H}, {k, k_token, k_head, K}}, value = {v, v_token, v_head, K};
  const Heads to[2] = {{yq, H * E, E, H}, {yk, K * E, E, K}}, kept[2] = {{k_cache, K * E, E, K}, {v_cache, K * E, E, K}};
  const float* weight[2] = {array<const float>(q_norm), array<const float>(k_norm)};
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const int64_t at = array<const int64_t>(positions)[t] * (E / 2);
      const Turn turn{array<const float>(cos) + at, array<const float>(sin) + at, static_cast<float>(sense), E / 2};
      for (int which = 0; which < 2; which++) {
        for (int64_t h = 0; h < from[which].count; h++) {
          const void* x = from[which].of<const void>(t, h, rows.bytes);
          const float r = weight[which] ? inverse(rows, x, E, eps) : 1;
          rows.turn(to[which].of<void>(t, h, rows.bytes), x, turn, weight[which], r);
        }
      }
      if (!v) continue;
      const int64_t slot = array<const int64_t>(slots)[t];
      std::memcpy(kept[0].of<void>(slot, 0, rows.bytes), to[1].of<void>(t, 0, rows.bytes), K * E * rows.bytes);
      for (int64_t h = 0; h < K; h++) {
        std::memcpy(kept[1].of<void>(slot, h, rows.bytes), value.of<const void>(t, h, rows.bytes), E * rows.bytes);
      }
    }
  };
  parallel(T, 1 + 8192 / ((H + K) * E + 1), threads, body);
}

void rope_backward_cpu(Address gq, Address gk, Address wq, Address wk, Address dq, int64_t dq_token, int64_t dq_head, Address dk,
                       int64_t dk_token, int64_t dk_head, Address q, int64_t q_token, int64_t q_head, Address k, int64_t k_token,
                       int64_t k_head, int code, Address positions, Address cos, Address sin, int64_t N, Address q_norm, Address k_norm,
                       double eps, int64_t T, int64_t H, int64_t K, int64_t E, int threads) {
  check(code, T, H, K, E, threads);
  FASTRL_CHECK(T == 0 || (gq && gk && dq && dk && positions && cos && sin), "gq, gk, dq, dk, positions, cos, sin", "addresses", "0");
  FASTRL_CHECK(!q_norm == !wq && !k_norm == !wk, "wq, wk", "an address exactly where there is a norm", "another");
  FASTRL_CHECK(T == 0 || ((!q_norm || q) && (!k_norm || k)), "q, k", "addresses where there is a norm", "0");
  check_range("positions", array<const int64_t>(positions), T, N);
  const RopeRows& rows = FASTRL_CHOOSE(kRopeRows)[code];
  const Heads up[2] = {{dq, dq_token, dq_head, H}, {dk, dk_token, dk_head, K}}, from[2] = {{q, q_token, q_head, H}, {k, k_token, k_head, K}};
  const Heads to[2] = {{gq, H * E, E, H}, {gk, K * E, E, K}};
  const float* weight[2] = {array<const float>(q_norm), array<const float>(k_norm)};
  const int64_t each = std::max(kTokens, (T + kBlocks - 1) / kBlocks), blocks = (T + each - 1) / each;
  std::vector<float> partials(blocks * 2 * E);
  auto body = [&](int64_t begin, int64_t end) {
    std::vector<float> heads(E);
    for (int64_t i = begin * each; i < std::min(T, end * each); i++) {
      const int64_t at = array<const int64_t>(positions)[i] * (E / 2);
      const Turn turn{array<const float>(cos) + at, array<const float>(sin) + at, -1, E / 2};
      for (int which = 0; which < 2; which++) {
        std::fill(heads.begin(), heads.end(), 0.0f);
        for (int64_t h = 0; h < up[which].count; h++) {
          void* out = to[which].of<void>(i, h, rows.bytes);
          const void* d = up[which].of<const void>(i, h, rows.bytes);
          if (weight[which]) {
            const void* x = from[which].of<const void>(i, h, rows.bytes);
            rows.gradients(out, heads.data(), d, x, turn, weight[which], inverse(rows, x, E, eps));
          } else {
            rows.turn(out, d, turn, nullptr, 1);
          }
        }
        for (int64_t e = 0; e < E; e++) partials[(i / each * 2 + which) * E + e] += heads[e];
      }
    }
  };
  parallel(blocks, 1, threads, body);
  for (int which = 0; which < 2; which++) {
    float* out = array<float>(which ? wk : wq);
    for (int64_t e = 0; e < E && out; e++) {
      double sum = 0;
      for (int64_t b = 0; b < blocks; b++) sum += partials[(b * 2 + which) * E + e];
      out[e] = static_cast<float>(sum);
    }
  }
}

}  // namespace fastrl
