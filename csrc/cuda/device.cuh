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
constexpr int kPack = 16 / sizeof(T);  // elements of a pack: 16 bytes, what one access moves; a uint4, since ptxas takes structs apart

// A row of n elements: `head` of them before the first 16-byte boundary, `packs` whole packs, then a tail.  n is below 2^31.
template <class T>
struct Span {
  int head, packs;

  __device__ Span(const T* row, int n) {
    const int past = static_cast<int>(reinterpret_cast<std::uintptr_t>(row) % 16);
    const int before = (16 - past) % 16 / static_cast<int>(sizeof(T));
    head = before < n ? before : n;
    packs = (n - head) / kPack<T>;
  }
  __device__ int tail() const { return head + packs * kPack<T>; }  // where it begins
  // The element outside of the packs that thread i handles; n or more: none.
  __device__ int edge(int i) const { return i < head ? i : tail() + i - head; }
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void assign(float& to, float x) { to = x; }
__device__ inline void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

template <class T>
__device__ inline void to_floats(float* x, const uint4& pack) {  // bf16 is the upper half of a float: one instruction each
  const unsigned words[4] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
  for (int w = 0; w < 4; w++) {
    if constexpr (sizeof(T) == 4) {
      x[w] = __uint_as_float(words[w]);
    } else {
      x[2 * w] = __uint_as_float(words[w] << 16);
      x[2 * w + 1] = __uint_as_float(words[w] & 0xffff0000u);
    }
  }
}

__device__ inline unsigned two_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}

// One store of 16 or 8 bytes; in assembly, because the compiler may split that of a uint4.
__device__ inline void store_words(void* to, unsigned a, unsigned b, unsigned c, unsigned d) {
  const auto global = __cvta_generic_to_global(to);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ inline void store_words(void* to, unsigned a, unsigned b) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(a), "r"(b) : "memory");
}

__device__ inline void store_wide(float* to, const float (&x)[4]) {
  store_words(to, __float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
}
__device__ inline void store_wide(__nv_bfloat16* to, const float (&x)[4]) {
  store_words(to, two_bf16(x[0], x[1]), two_bf16(x[2], x[3]));
}
__device__ inline void store_wide(__nv_bfloat16* to, const float (&x)[8]) {
  store_words(to, two_bf16(x[0], x[1]), two_bf16(x[2], x[3]), two_bf16(x[4], x[5]), two_bf16(x[6], x[7]));
}

template <int N, class T>
__device__ inline bool fits_wide(const T* to) {  // whether N elements can be stored there at once
  return reinterpret_cast<std::uintptr_t>(to) % (N * sizeof(T)) == 0;
}

template <bool kWide, class T, int N>
__device__ inline void store_floats(T* to, const float (&x)[N]) {
  if constexpr (kWide) {
    store_wide(to, x);
  } else {
#pragma unroll
    for (int j = 0; j < N; j++) assign(to[j], x[j]);
  }
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
    device = attributes.device >= 0 ? attributes.device : before_;
    if (device != before_) check(cudaSetDevice(device), "device");
  }
  ~DeviceOf() { cudaSetDevice(before_); }
  DeviceOf(const DeviceOf&) = delete;
  DeviceOf& operator=(const DeviceOf&) = delete;

  int device = 0;

  static void check(cudaError_t error, const char* what) {  // RuntimeError in Python
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA, ") + what + ": " + cudaGetErrorString(error));
  }

 private:
  int before_ = 0;
};

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  DeviceOf::check(cudaDeviceGetAttribute(&value, name, device), "device");
  return value;
}

}  // namespace fastrl
