// Every compiled op, with its shapes.  Arrays are raw addresses, so that this builds without torch; 0 means absent.
// Strides count elements.  Floats of type `code` are 0 = fp32, 1 = bf16; everything else is fp32 or int64 and contiguous.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fastrl {

using Address = std::uintptr_t;

enum Float : int { kFloat32 = 0, kBFloat16 = 1 };

// --- token_logp: formulas in kernels/token_logp.py ----------------------------------------------------
// logits (T, V) code; target (T,) int64; temperature (T,)  ->  logp, entropy or 0, m, log_s, each (T,)
void token_logp_forward_cpu(Address logits, int code, int64_t stride, Address target, Address temperature, Address logp,
                            Address entropy, Address m, Address log_s, int64_t T, int64_t V, int threads);
// out (T, V) code, may be `logits` itself; dlogp (T,); dentropy (T,) or 0, with entropy (T,) beside it
void token_logp_backward_cpu(Address out, int64_t out_stride, Address logits, int code, int64_t stride, Address target,
                             Address temperature, Address dlogp, Address dentropy, Address entropy, Address m,
                             Address log_s, int64_t T, int64_t V, int threads);
#ifdef FASTRL_CUDA
void token_logp_forward_cuda(Address logits, int code, int64_t stride, Address target, Address temperature, Address logp,
                             Address entropy, Address m, Address log_s, int64_t T, int64_t V, Address stream);
void token_logp_backward_cuda(Address out, int64_t out_stride, Address logits, int code, int64_t stride, Address target,
                              Address temperature, Address dlogp, Address dentropy, Address entropy, Address m,
                              Address log_s, int64_t T, int64_t V, Address stream);
#endif

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
