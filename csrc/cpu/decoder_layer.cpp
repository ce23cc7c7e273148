// A decoder layer for one new token of every row: what Layer.forward of fastrl/model/decoder.py calls, one kernel after the other.
//
// Nothing is computed here: each call is the kernel that the op of that name runs, on buffers that stay hot.
#include <cstdint>
#include <vector>

#include "../check.h"
#include "../ops.h"

namespace fastrl {
namespace {

using Floats = std::vector<float>;

Address of(const Floats& buffer) { return reinterpret_cast<Address>(buffer.data()); }

struct Buffers {
  Floats normed, r, qkv, q, k, attended, added, gate_up, gated;
};

}  // namespace

void decoder_layer_cpu(Address y, Address residual_out, Address x, Address residual, const LayerWeights& w, const LayerPlace& p, double eps,
                       int64_t B, int64_t D, int64_t F, int64_t H, int64_t K, int64_t E, int threads) {
  static thread_local Buffers b;
  const int64_t heads = H + 2 * K;
  FASTRL_CHECK(B >= 1 && D >= 1 && F >= 1 && K >= 1 && E >= 1, "B, D, F, K, E", "at least 1", "less");
  FASTRL_CHECK(threads >= 1, "threads", "at least 1", threads);
  b.r.resize(B), b.normed.resize(B * D), b.added.resize(B * D), b.gate_up.resize(2 * B * F), b.gated.resize(B * F);
  b.qkv.resize(B * heads * E), b.q.resize(B * H * E), b.k.resize(B * K * E), b.attended.resize(B * H * E);
  const auto add_norm = [&](Address in, Address other, Address weight) {
    rms_norm_forward_cpu(of(b.normed), other ? residual_out : 0, of(b.r), in, D, other, D, kFloat32, weight, eps, B, D, threads);
  };
  const auto linear = [&](Address out, const Floats& in, Address weight, Address bias, int64_t n, int64_t k) {
    linear_forward_cpu(out, n, kFloat32, of(in), k, weight, k, kFloat32, bias, B, n, k, threads);
  };
  add_norm(x, residual, w.input_norm);
  linear(of(b.qkv), b.normed, w.qkv, w.qkv_bias, heads * E, D);
  const Address q = of(b.qkv), k = q + H * E * sizeof(float), v = k + K * E * sizeof(float);
  rope_forward_cpu(of(b.q), of(b.k), q, heads * E, E, k, heads * E, E, kFloat32, p.positions, p.cos, p.sin, p.angles, w.q_norm, w.k_norm,
                   eps, 1, v, heads * E, E, p.k_cache, p.v_cache, p.slots, p.pages * p.page, B, H, K, E, threads);
  decode_attention_cpu(of(b.attended), of(b.q), H * E, E, kFloat32, p.k_cache, p.v_cache, p.table, p.table_stride, p.lengths, 0, p.scale, B,
                       B, p.columns, H, K, E, p.pages, p.page, threads);
  linear(of(b.added), b.attended, w.out, 0, D, H * E);
  add_norm(of(b.added), residual ? residual_out : x, w.mlp_norm);  // without a residual, x is the stream
  linear(of(b.gate_up), b.normed, w.gate_up, 0, 2 * F, D);
  swiglu_forward_cpu(of(b.gated), of(b.gate_up), 2 * F, kFloat32, B, F, threads);
  linear(y, b.gated, w.down, 0, D, F);
}

}  // namespace fastrl
