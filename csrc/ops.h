// Every compiled op, with its shapes.  Arrays are raw addresses, so that this builds without torch; 0 means absent.
// Strides count elements.  Floats of type `code` are 0 = fp32, 1 = bf16; everything else is fp32 or int64 and contiguous.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace fastrl {

using Address = std::uintptr_t;

enum Float : int { kFloat32 = 0, kBFloat16 = 1 };

struct RowsAt {  // where row t begins, in elements
  int64_t L, batch, row;
#ifdef __CUDACC__
  __host__ __device__
#endif
  int64_t operator()(int64_t t) const {
    return t / L * batch + t % L * row;
  }
};

// --- token_logp: formulas in kernels/token_logp.py ----------------------------------------------------
// logits are (T, V), or (B, L, V) with T = B L: row t begins t / L times `batch` and t % L times `row` elements from the start.
// logits code; target (T,) int64; temperature (T,)  ->  logp, entropy or 0, m, log_s, each (T,)
void token_logp_forward_cpu(Address logits, int code, int64_t L, int64_t batch, int64_t row, Address target,
                            Address temperature, Address logp, Address entropy, Address m, Address log_s, int64_t T,
                            int64_t V, int threads);
// out like logits, may be `logits` itself; dlogp (T,); dentropy (T,) or 0, with entropy (T,) beside it
void token_logp_backward_cpu(Address out, int64_t out_batch, int64_t out_row, Address logits, int code, int64_t L,
                             int64_t batch, int64_t row, Address target, Address temperature, Address dlogp,
                             Address dentropy, Address entropy, Address m, Address log_s, int64_t T, int64_t V,
                             int threads);
// Both at once, for derivatives that are known before the forward: the logits are overwritten by their gradient.
void token_logp_fused_cpu(Address logits, int code, int64_t L, int64_t batch, int64_t row, Address target,
                          Address temperature, Address dlogp, Address dentropy, Address logp, Address entropy, Address m,
                          Address log_s, int64_t T, int64_t V, int threads);
#ifdef FASTRL_CUDA
// The gradient may be narrower than the logits (`out_code`), and then lie in the front of the rows it is computed from.
void token_logp_forward_cuda(Address logits, int code, int64_t L, int64_t batch, int64_t row, Address target,
                             Address temperature, Address logp, Address entropy, Address m, Address log_s, int64_t T,
                             int64_t V, Address stream);
void token_logp_backward_cuda(Address out, int out_code, int64_t out_batch, int64_t out_row, Address logits, int code,
                              int64_t L, int64_t batch, int64_t row, Address target, Address temperature, Address dlogp,
                              Address dentropy, Address entropy, Address m, Address log_s, int64_t T, int64_t V,
                              Address stream);
void token_logp_fused_cuda(Address out, int out_code, int64_t out_batch, int64_t out_row, Address logits, int code,
                           int64_t L, int64_t batch, int64_t row, Address target, Address temperature, Address dlogp,
                           Address dentropy, Address logp, Address entropy, Address m, Address log_s, int64_t T, int64_t V,
                           Address stream);
int64_t token_logp_fused_limit(int code, int device);  // the largest V of which a cluster keeps a row on chip; 0 without clusters

// --- the CUDA build: csrc/cuda/build.cu ---------------------------------------------------------------
const char* cuda_architectures();
int cuda_runtime_version();
int cuda_driver_version();
#endif

// --- perturb: formulas in kernels/perturb.py ----------------------------------------------------------
// norm 0 = l2, 1 = linf, 2 = l1; mask (T,) bytes or 0; ends (S+1,) int64 of the balls' tokens, or 0: each token is a ball.
// delta (T, D), changed; grad (T, D) code; embeds (T, D) embeds_code and out (T, D) out_code, which becomes embeds + delta, or 0
void perturb_step_cpu(Address delta, int64_t delta_stride, Address grad, int code, int64_t grad_stride, Address mask, Address ends,
                      int64_t S, int64_t T, int64_t D, double step_size, double radius, int norm, Address embeds, int embeds_code,
                      int64_t embeds_stride, Address out, int out_code, int64_t out_stride, int threads);
// delta (T, D), contiguous: the start
void perturb_init_cpu(Address delta, Address mask, Address ends, int64_t S, int64_t T, int64_t D, double radius, int norm,
                      int64_t seed, int threads);

// --- sample: formulas in kernels/sample.py ------------------------------------------------------------
// logits (B, V) code; seed, sequence, position (B,) int64; temperature (B,)
// ->  token (B,) int64; logp, behaviour_logp, entropy (B,)
void sample_forward_cpu(Address logits, int code, int64_t stride, Address seed, Address sequence, Address position,
                        Address temperature, Address token, Address logp, Address behaviour_logp, Address entropy, int64_t B,
                        int64_t V, int64_t top_k, double top_p, double min_p, int threads);

// --- group_advantage, gae: formulas in kernels/group_advantage.py and kernels/gae.py ------------------------
// reward (S,) fp32 or fp64; group (S,) int64 ids, or 0 for contiguous groups of `size`  ->  out (S,) like reward
void group_advantage_cpu(Address reward, bool is_double, Address group, int64_t size, int baseline, int scale, int shape,
                         double eps, bool unbiased, double tau, Address out, int64_t S, int threads);
// reward, value (T,) fp32 or fp64; cu_seqlens (S+1,) int64; mask (T,) bool or 0  ->  advantage, returns, each (T,) like reward
void gae_cpu(Address reward, Address value, bool is_double, Address cu_seqlens, Address mask, double gamma, double lam,
             Address advantage, Address returns, int64_t T, int64_t S, int threads);

// --- rms_norm: formulas in kernels/rms_norm.py --------------------------------------------------------
// x, residual or 0 (T, D) code; weight (D,)  ->  y, h = x + residual or 0 (T, D) code, contiguous; r (T,)
void rms_norm_forward_cpu(Address y, Address h, Address r, Address x, int64_t x_stride, Address residual, int64_t residual_stride,
                          int code, Address weight, double eps, int64_t T, int64_t D, int threads);
// dy, dh or 0, x (T, D) code; weight (D,); r (T,)  ->  dx (T, D) code, contiguous; dw (D,)
void rms_norm_backward_cpu(Address dx, Address dw, Address dy, int64_t dy_stride, Address dh, int64_t dh_stride, Address x,
                           int64_t x_stride, int code, Address weight, Address r, int64_t T, int64_t D, int threads);

// --- rope: formulas in kernels/rope.py ----------------------------------------------------------------
// q (T, H, E), k (T, K, E) code; positions (T,) in [0, N); cos, sin (N, E/2); q_norm, k_norm (E,) or 0; sense 1, or -1 to turn back
// ->  yq, yk (T, H | K, E) code, contiguous.  With v (T, K, E): yk and v also go to `slots` (T,) of k_cache, v_cache (cache_rows, K, E)
void rope_forward_cpu(Address yq, Address yk, Address q, int64_t q_token, int64_t q_head, Address k, int64_t k_token, int64_t k_head,
                      int code, Address positions, Address cos, Address sin, int64_t N, Address q_norm, Address k_norm, double eps,
                      double sense, Address v, int64_t v_token, int64_t v_head, Address k_cache, Address v_cache, Address slots,
                      int64_t cache_rows, int64_t T, int64_t H, int64_t K, int64_t E, int threads);
// dq, dk like q, k; q and k are read where there is a norm  ->  gq, gk code, contiguous; wq, wk (E,) where there is a norm, else 0
void rope_backward_cpu(Address gq, Address gk, Address wq, Address wk, Address dq, int64_t dq_token, int64_t dq_head, Address dk,
                       int64_t dk_token, int64_t dk_head, Address q, int64_t q_token, int64_t q_head, Address k, int64_t k_token,
                       int64_t k_head, int code, Address positions, Address cos, Address sin, int64_t N, Address q_norm, Address k_norm,
                       double eps, int64_t T, int64_t H, int64_t K, int64_t E, int threads);

// --- swiglu: formulas in kernels/swiglu.py --------------------------------------------------------------
// x (T, 2F) code  ->  y (T, F) code, contiguous
void swiglu_forward_cpu(Address y, Address x, int64_t stride, int code, int64_t T, int64_t F, int threads);
// dy (T, F), x (T, 2F) code  ->  dx (T, 2F) code, contiguous
void swiglu_backward_cpu(Address dx, Address dy, int64_t dy_stride, Address x, int64_t stride, int code, int64_t T, int64_t F,
                         int threads);

// --- linear: formulas in kernels/linear.py --------------------------------------------------------------
// x (M, K), w (N, K) code; bias (N,) fp32 or 0  ->  y (M, N) `out`: fp32 or code
void linear_forward_cpu(Address y, int64_t y_stride, int out, Address x, int64_t x_stride, Address w, int64_t w_stride, int code,
                        Address bias, int64_t M, int64_t N, int64_t K, int threads);
// dy (T, N), w (N, K) fp32  ->  dx = dy w (T, K) fp32
void linear_input_grad_cpu(Address dx, int64_t dx_stride, Address dy, int64_t dy_stride, Address w, int64_t w_stride, int64_t T, int64_t N,
                           int64_t K, int threads);
// a (T, M), b (T, N) fp32  ->  y (M, N) fp32 = a^T b, or y + a^T b
void linear_weight_grad_cpu(Address y, int64_t y_stride, Address a, int64_t a_stride, Address b, int64_t b_stride, int64_t T, int64_t M,
                            int64_t N, bool add, int threads);

// --- attention: formulas in kernels/attention.py ----------------------------------------------------------
// q (T, H, E), k, v (T_k, K, E) code; ends, ends_k (S+1,) int64, where each sequence's queries are its last tokens
// ->  y (T, H, E) code, contiguous; lse (T, H) or 0
void attention_forward_cpu(Address y, Address lse, Address q, int64_t q_token, int64_t q_head, Address k, int64_t k_token, int64_t k_head,
                           Address v, int64_t v_token, int64_t v_head, int code, Address ends, Address ends_k, double scale, int64_t S,
                           int64_t T, int64_t T_k, int64_t H, int64_t K, int64_t E, int threads);
// dy, q (T, H, E), k, v (T, K, E), y (T, H, E), contiguous, code; lse (T, H)  ->  dq (T, H, E), dk, dv (T, K, E) code, contiguous
void attention_backward_cpu(Address dq, Address dk, Address dv, Address dy, int64_t dy_token, int64_t dy_head, Address q, int64_t q_token,
                            int64_t q_head, Address k, int64_t k_token, int64_t k_head, Address v, int64_t v_token, int64_t v_head,
                            Address y, Address lse, int code, Address ends, double scale, int64_t S, int64_t T, int64_t H, int64_t K,
                            int64_t E, int threads);

// --- decode_attention: formula in kernels/decode_attention.py ---------------------------------------------
// q (B, H, E) code; k_cache, v_cache (pages, page, K, E) code, contiguous; block_table (R, N) int32; lengths (B,) int32;
// rows (B,) or 0: query b takes row b of the table, and R = B  ->  y (B, H, E) code, contiguous
void decode_attention_cpu(Address y, Address q, int64_t q_token, int64_t q_head, int code, Address k_cache, Address v_cache,
                          Address block_table, int64_t table_stride, Address lengths, Address rows, double scale, int64_t B, int64_t R,
                          int64_t N, int64_t H, int64_t K, int64_t E, int64_t pages, int64_t page, int threads);

// --- advance: the step in kernels/advance.py ----------------------------------------------------------------
// draw (4), rows (8), records (8) and pages (3) as the tuples there list them; B rows of N pages, S records of C tokens, P pages
void advance_cpu(const std::vector<Address>& draw, const std::vector<Address>& rows, const std::vector<Address>& records,
                 const std::vector<Address>& pages, Address stops, int64_t n_stops, int64_t version, Address total, int64_t B,
                 int64_t N, int64_t S, int64_t C, int64_t P, int64_t page);

// alive (B,) bool; length, until (B,) int64  ->  rows alive, pages that they may come to need
std::array<int64_t, 2> need_cpu(Address alive, Address length, Address until, int64_t B, int64_t page);

// --- decoder_layer: the layer in model/decoder.py, one new token a row, all fp32 -------------------------------------
struct LayerWeights {  // 0 where the layer has none
  Address input_norm, qkv, qkv_bias, q_norm, k_norm, out, mlp_norm, gate_up, down;
};
struct LayerPlace {  // positions, slots (B,) int64; `angles` rows of cos and sin; lengths (B,) int32; table (B, columns) int32
  Address positions, cos, sin, slots, k_cache, v_cache, table, lengths;
  int64_t angles, pages, page, table_stride, columns;
  double scale;  // of the scores
};
// x, residual or 0 (B, D)  ->  y (B, D), what the layer adds to residual_out (B, D)
void decoder_layer_cpu(Address y, Address residual_out, Address x, Address residual, const LayerWeights& weights, const LayerPlace& place,
                       double eps, int64_t B, int64_t D, int64_t F, int64_t H, int64_t K, int64_t E, int threads);

// --- policy_loss: formulas in kernels/policy_loss.py --------------------------------------------------
// logp, old_logp, advantage, weight (T,); entropy, ref_logp, correction (T,) or 0; mask (T,) bytes or 0; ends (S+1,) int64 where
// the ratio is per sequence, or 0  ->  loss (), metrics (16,), dlogp (T,), dentropy (T,) with entropy
void policy_loss_cpu(Address logp, Address entropy, Address old_logp, Address advantage, Address weight, Address ref_logp,
                     Address correction, Address mask, Address ends, int64_t S, Address loss, Address metrics, Address dlogp,
                     Address dentropy, int surrogate, const std::vector<double>& params, int kl, double kl_coef,
                     double entropy_coef, int64_t T, int threads);

// --- what this process runs on ------------------------------------------------------------------------
std::string cpu_isa();                 // the instruction set the CPU kernels use; FASTRL_CPU_ISA overrules it
std::vector<std::string> cpu_isas();   // those this processor has, slowest first
std::string threads_from();            // file of the OpenMP runtime shared with torch, or "" for one thread

}  // namespace fastrl
