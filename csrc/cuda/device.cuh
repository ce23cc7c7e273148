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

template <class T>
struct alignas(16) Pack {  // what one 16-byte access moves
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

// A row of n elements: `head` of them before the first 16-byte boundary, `packs` whole packs, then a tail.  When `other` (the
// row that is written) is aligned differently, there are no packs and everything is moved element by element.
template <class T>
struct Span {
  int64_t head, packs;

  __device__ Span(const T* row, const T* other, int64_t n) {
    const auto a = reinterpret_cast<std::uintptr_t>(row), b = reinterpret_cast<std::uintptr_t>(other);
    const int64_t before = static_cast<int64_t>((16 - a % 16) % 16 / sizeof(T));
    const bool wide = a % 16 == b % 16 && before <= n;
    head = wide ? before : n;
    packs = wide ? (n - before) / Pack<T>::kSize : 0;
  }
  __device__ int64_t tail() const { return head + packs * Pack<T>::kSize; }  // where it begins
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void assign(float& to, float x) { to = x; }
__device__ inline void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

__device__ inline float exp2_fast(float x) {  // 2 ulp; 0 for x below -126; NaN stays NaN
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
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
