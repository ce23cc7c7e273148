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

// --- rms_norm: formulas in kernels/rms_norm.py --------------------------------------------------------
// x, residual or 0 (T, D) code; weight (D,)  ->  y, h = x + residual or 0 (T, D) code, contiguous; r (T,)
void rms_norm_forward_cpu(Address y, Address h, Address r, Address x, int64_t x_stride, Address residual, int64_t residual_stride,
                          int code, Address weight, double eps, int64_t T, int64_t D, int threads);
// dy, dh or 0, x (T, D) code; weight (D,); r (T,)  ->  dx (T, D) code, contiguous; dw (D,)
void rms_norm_backward_cpu(Address dx, Address dw, Address dy, int64_t dy_stride, Address dh, int64_t dh_stride, Address x,
                           int64_t x_stride, int code, Address weight, Address r, int64_t T, int64_t D, int threads);

// --- swiglu: formulas in kernels/swiglu.py --------------------------------------------------------------
// x (T, 2F) code  ->  y (T, F) code, contiguous
void swiglu_forward_cpu(Address y, Address x, int64_t stride, int code, int64_t T, int64_t F, int threads);
// dy (T, F), x (T, 2F) code  ->  dx (T, 2F) code, contiguous
void swiglu_backward_cpu(Address dx, Address dy, int64_t dy_stride, Address x, int64_t stride, int code, int64_t T, int64_t F,
                         int threads);

// --- what this process runs on ------------------------------------------------------------------------
std::string cpu_isa();                 // the instruction set the CPU kernels use; FASTRL_CPU_ISA overrules it
std::vector<std::string> cpu_isas();   // those this processor has, slowest first
std::string threads_from();            // file of the OpenMP runtime shared with torch, or "" for one thread

}  // namespace fastrl
