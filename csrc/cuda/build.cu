// What this build needs of a machine: kernels/_native/build.py compares it with the GPU and its driver.
#include <cuda_runtime.h>

#include "../ops.h"

namespace fastrl {

const char* cuda_architectures() { return FASTRL_CUDA_ARCH; }  // as in setup.py: "80,90+PTX"
int cuda_runtime_version() { return CUDART_VERSION; }          // 13000 is CUDA 13.0

int cuda_driver_version() {  // the newest CUDA that the driver knows; 0 without a driver
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace fastrl
