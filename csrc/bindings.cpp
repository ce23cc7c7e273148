// The one Python module.  Kernels run without the GIL; std::invalid_argument arrives as ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops.h"

namespace py = pybind11;
using namespace fastrl;

PYBIND11_MODULE(_C, m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Compiled kernels of fastrl.  They take raw addresses: call them through fastrl.ops.";

  m.def("token_logp_forward_cpu", &token_logp_forward_cpu, NoGil());
  m.def("token_logp_backward_cpu", &token_logp_backward_cpu, NoGil());
  m.def("token_logp_fused_cpu", &token_logp_fused_cpu, NoGil());
#ifdef FASTRL_CUDA
  m.def("token_logp_forward_cuda", &token_logp_forward_cuda, NoGil());
  m.def("token_logp_backward_cuda", &token_logp_backward_cuda, NoGil());
  m.def("token_logp_fused_cuda", &token_logp_fused_cuda, NoGil());
  m.def("token_logp_fused_limit", &token_logp_fused_limit);
  m.def("cuda_architectures", &cuda_architectures);
  m.def("cuda_runtime_version", &cuda_runtime_version);
  m.def("cuda_driver_version", &cuda_driver_version);
#endif
  m.def("sample_forward_cpu", &sample_forward_cpu, NoGil());

  m.def("perturb_step_cpu", &perturb_step_cpu, NoGil());
  m.def("perturb_init_cpu", &perturb_init_cpu, NoGil());

  m.def("group_advantage_cpu", &group_advantage_cpu, NoGil());
  m.def("gae_cpu", &gae_cpu, NoGil());

  m.def("rms_norm_forward_cpu", &rms_norm_forward_cpu, NoGil());
  m.def("rms_norm_backward_cpu", &rms_norm_backward_cpu, NoGil());
  m.def("rope_forward_cpu", &rope_forward_cpu, NoGil());
  m.def("rope_backward_cpu", &rope_backward_cpu, NoGil());
  m.def("swiglu_forward_cpu", &swiglu_forward_cpu, NoGil());
  m.def("swiglu_backward_cpu", &swiglu_backward_cpu, NoGil());

  m.def("linear_forward_cpu", &linear_forward_cpu, NoGil());
  m.def("linear_input_grad_cpu", &linear_input_grad_cpu, NoGil());
  m.def("linear_weight_grad_cpu", &linear_weight_grad_cpu, NoGil());

  m.def("attention_forward_cpu", &attention_forward_cpu, NoGil());
  m.def("attention_backward_cpu", &attention_backward_cpu, NoGil());
  m.def("decode_attention_cpu", &decode_attention_cpu, NoGil());

  m.def("advance_cpu", &advance_cpu, NoGil());
  m.def("need_cpu", &need_cpu, NoGil());

  m.def("decoder_layer_cpu", [](Address y, Address residual_out, Address x, Address residual, const std::array<Address, 9>& w,
                                const std::array<Address, 8>& p, const std::array<int64_t, 5>& n, double scale, double eps, int64_t B,
                                int64_t D, int64_t F, int64_t H, int64_t K, int64_t E, int threads) {
    const LayerWeights weights{w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8]};
    const LayerPlace place{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], n[0], n[1], n[2], n[3], n[4], scale};
    decoder_layer_cpu(y, residual_out, x, residual, weights, place, eps, B, D, F, H, K, E, threads);
  }, NoGil());

  m.def("policy_loss_cpu", &policy_loss_cpu, NoGil());

  m.def("cpu_isa", &cpu_isa);
  m.def("cpu_isas", &cpu_isas);
  m.def("threads_from", &threads_from);
}
