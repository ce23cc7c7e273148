// In place of the CUDA runtime, on a machine without a GPU: launches of the compiled sources are handed to a function of the
// tests, with the name of the kernel, its grid and its arguments.  Nothing runs on a device.
#include <cuda_runtime_api.h>

#include <map>
#include <string>

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared;
};

using Receive = void (*)(const char* kernel, const unsigned* grid, unsigned threads, size_t shared, unsigned cluster, void** arguments);

Receive receive = nullptr;
Configuration pushed;

std::map<const void*, std::string>& names() {  // host function -> its kernel
  static std::map<const void*, std::string> table;
  return table;
}

void hand_over(const void* function, dim3 grid, dim3 block, size_t shared, unsigned cluster, void** arguments) {
  const unsigned blocks[3] = {grid.x, grid.y, grid.z};
  if (receive != nullptr) receive(names()[function].c_str(), blocks, block.x, shared, cluster, arguments);
}

}  // namespace

extern "C" {

void set_receiver(Receive function) { receive = function; }

// --- what nvcc's host code calls -----------------------------------------------------------------------
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  names()[host] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void*) {
  pushed = {grid, block, shared};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void*) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  hand_over(kernel, grid, block, shared, 1, arguments);
  return cudaSuccess;
}

// --- what our own host code calls ----------------------------------------------------------------------
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
  }
  hand_over(function, config->gridDim, config->blockDim, config->dynamicSmemBytes, cluster, arguments);
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void*) {
  *attributes = {};
  attributes->device = -1;  // on no device: the current one stays
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {  // an H200's
  *value = attribute == cudaDevAttrComputeCapabilityMajor           ? 9
           : attribute == cudaDevAttrComputeCapabilityMinor         ? 0
           : attribute == cudaDevAttrMultiProcessorCount            ? 132
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin   ? 227 << 10
                                                                    : 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the stand-in for the CUDA runtime"; }
}
