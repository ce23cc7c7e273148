// Shared device code: 16-byte loads of a row whatever its alignment, fast exp2, launch errors.  Nothing of one op.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastrl {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kMasked = -1e30f;  // stands for -inf, so that 0 * -inf never happens

template <class T, int N = 16 / sizeof(T)>
struct alignas(N * sizeof(T)) Pack {  // what one access moves: 16 bytes, unless it is the narrower copy of such a pack
  static constexpr int kSize = N;
  T at[kSize];
};

// A row of n elements: `head` of them before the first 16-byte boundary, `packs` whole packs, then a tail.
template <class T>
struct Span {
  int64_t head, packs;

  __device__ Span(const T* row, int64_t n) {
    const auto past = reinterpret_cast<std::uintptr_t>(row) % 16;
    const int64_t before = static_cast<int64_t>((16 - past) % 16 / sizeof(T));
    head = before < n ? before : n;
    packs = (n - head) / Pack<T>::kSize;
  }
  __device__ int64_t tail() const { return head + packs * Pack<T>::kSize; }  // where it begins
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void assign(float& to, float x) { to = x; }
__device__ inline void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

template <class T, int N>
__device__ inline void store_pack(T* to, const Pack<T, N>& pack, bool wide) {  // `wide`: `to` is a multiple of the pack's size
  if (wide) {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
    return;
  }
#pragma unroll
  for (int j = 0; j < N; j++) to[j] = pack.at[j];
}

__device__ inline float exp2_fast(float x) {  // 2 ulp; 0 for x below -126; NaN stays NaN
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16 bytes from global to shared memory, in the background: arrived once `wait_copies` and a barrier have passed.
__device__ inline void copy_async(void* shared, const void* global) {
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ inline void wait_copies() {  // for all but the N youngest groups of this thread
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Makes the device that `address` lives on current, for the lifetime of this object.
class DeviceOf {
 public:
  explicit DeviceOf(const void* address) {
    cudaPointerAttributes attributes{};
    check(cudaGetDevice(&before_), "device");
    check(cudaPointerGetAttributes(&attributes, address), "device");
    if (attributes.device >= 0 && attributes.device != before_) check(cudaSetDevice(attributes.device), "device");
  }
  ~DeviceOf() { cudaSetDevice(before_); }
  DeviceOf(const DeviceOf&) = delete;
  DeviceOf& operator=(const DeviceOf&) = delete;

  static void check(cudaError_t error, const char* what) {  // RuntimeError in Python
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA, ") + what + ": " + cudaGetErrorString(error));
  }

 private:
  int before_ = 0;
};

}  // namespace fastrl
