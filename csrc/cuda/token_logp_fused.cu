// Forward and gradient of token_logp in one read of the logits, for derivatives that are known before the forward: formulas in
// token_logp.cuh.
//
// Tile map:  a cluster of C CTAs owns a row, each a slice of it, and strides over further rows by the grid.  A slice travels to
//            shared memory by asynchronous 16-byte copies in kStages groups, all in flight at once; a thread sums the packs it
//            copied itself as they arrive, so no barrier stands between.  Warps, then CTAs, then the cluster (by distributed
//            shared memory) merge their sums in a fixed order: every CTA finds the same bits.  Then each thread turns its packs
//            into gradients.  The row is on chip before any of it is stored, so the gradient may lie anywhere over it.
// Shared:    a slice of at most kSlice bytes where eight CTAs allow it, so that two CTAs share a multiprocessor and one loads
//            while the other stores; at most kMost bytes for the largest vocabularies.
// Traffic:   one read and one write of a row.
// Machine code (sm_90, bf16): 0.9 instructions an element to fetch it, 9.0 in the sums, 8.3 in the gradients.
#include <cooperative_groups.h>

#include <algorithm>
#include <mutex>

#include "token_logp.cuh"

namespace fastrl {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 512, kWarps = kThreads / 32, kStages = 4, kLargestCluster = 8;
constexpr int kEach = 16;  // elements of a thread at a time
constexpr int64_t kSlice = 108 << 10, kMost = 220 << 10;
constexpr int kStatic = 2 << 10;  // bytes of shared memory beside the slice, with what the system takes
constexpr int kDevices = 64;

struct Shares {  // what a CTA tells its cluster
  float top, s, a;
};

// The share of a CTA of a row's packs.  The elements outside of the packs are rank 0's, one a thread.
template <class T>
struct Slice {
  const uint4* packs;
  int first, count;  // of the row's packs

  __device__ Slice(const T* row, const Span<T>& span, int rank, int ranks) {
    const int each = (span.packs + ranks - 1) / ranks;
    first = rank * each;
    count = min(max(span.packs - first, 0), each);
    packs = reinterpret_cast<const uint4*>(row + span.head) + first;
  }
};

__device__ void fetch(uint4* chip, const uint4* packs, int count) {
  const int each = (count + kStages - 1) / kStages;
#pragma unroll
  for (int stage = 0; stage < kStages; stage++) {
    const int stop = min(each * (stage + 1), count);
    for (int i = each * stage + threadIdx.x; i < stop; i += kThreads) copy_async(&chip[i], &packs[i]);
    close_copies();
  }
}

template <class T>
__device__ void add_stage(Sums& sums, const uint4* chip, int count, int stage, float k) {
  constexpr int kPacks = kEach / kPack<T>;
  const int each = (count + kStages - 1) / kStages, stop = min(each * (stage + 1), count);
  int i = each * stage + threadIdx.x;
  for (; i + (kPacks - 1) * kThreads < stop; i += kPacks * kThreads) {
    float x[kEach];
#pragma unroll
    for (int u = 0; u < kPacks; u++) to_floats<T>(x + u * kPack<T>, chip[i + u * kThreads]);
    sums.add(x, k);
  }
  for (; i < stop; i += kThreads) {
    float x[kPack<T>];
    to_floats<T>(x, chip[i]);
    sums.add(x, k);
  }
}

template <class T>
__device__ Sums slice_sums(const uint4* chip, int count, float k) {
  static_assert(kStages == 4, "a wait for each stage");
  Sums sums;
  wait_copies<3>(), add_stage<T>(sums, chip, count, 0, k);
  wait_copies<2>(), add_stage<T>(sums, chip, count, 1, k);
  wait_copies<1>(), add_stage<T>(sums, chip, count, 2, k);
  wait_copies<0>(), add_stage<T>(sums, chip, count, 3, k);
  return sums;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FASTRL_CLUSTERS  // and the host's pass
#endif

#ifdef FASTRL_CLUSTERS
// The sums of the whole row, in every thread of the cluster.
__device__ Sums merge_cluster(Sums sums, float k, Shares* mine, float (*warps)[kWarps]) {
  const auto cluster = cg::this_cluster();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  sums.merge_warp(32, k);
  if (lane == 0) warps[0][warp] = sums.top, warps[1][warp] = sums.s, warps[2][warp] = sums.a;
  __syncthreads();
  if (warp == 0) {
    const int w = lane % kWarps;
    sums.top = warps[0][w], sums.s = warps[1][w], sums.a = warps[2][w];
    sums.merge_warp(kWarps, k);
    if (lane == 0) *mine = {sums.top, sums.s, sums.a};
  }
  cluster.sync();
  Sums all;
  for (unsigned r = 0; r < cluster.num_blocks(); r++) {
    const Shares share = *cluster.map_shared_rank(mine, r);
    all.merge(share.top, share.s, share.a, k);
  }
  return all;
}
#endif

template <bool kWide, class Out, class T, class F>
__device__ void pack_gradients(Out* to, const uint4* chip, int count, const F& gradient) {
  constexpr int kSize = kPack<T>;
  to += threadIdx.x * kSize;
#pragma unroll 2
  for (int i = threadIdx.x; i < count; i += kThreads) {
    float x[kSize];
    to_floats<T>(x, chip[i]);
#pragma unroll
    for (int j = 0; j < kSize; j++) x[j] = gradient(x[j]);
    store_floats<kWide>(to, x);
    to += kThreads * kSize;
  }
}

template <class Out, class T, class F>
__device__ void slice_gradient(Out* to, const uint4* chip, int count, const F& gradient) {
  if (fits_wide<kPack<T>>(to)) pack_gradients<true, Out, T>(to, chip, count, gradient);
  else pack_gradients<false, Out, T>(to, chip, count, gradient);
}

template <class Out, class T>
__global__ void __launch_bounds__(kThreads, 2)
    fused(Out* out, RowsAt out_at, const T* logits, RowsAt at, const int64_t* target, const float* temperature,
          const float* dlogp, const float* dentropy, float* logp, float* entropy, float* m, float* log_s, int64_t rows, int V) {
#ifdef FASTRL_CLUSTERS  // token_logp_fused_limit is 0 where there are none
  extern __shared__ uint4 chip[];
  __shared__ float warps[3][kWarps];
  __shared__ Shares mine;
  const auto cluster = cg::this_cluster();
  const int ranks = static_cast<int>(cluster.num_blocks()), rank = static_cast<int>(cluster.block_rank());
  for (int64_t t = blockIdx.x / ranks; t < rows; t += gridDim.x / ranks) {
    const T* row = logits + at(t);
    Out* to = out + out_at(t);
    const Span<T> span(row, V);
    const Slice<T> slice(row, span, rank, ranks);
    fetch(chip, slice.packs, slice.count);

    const float tau = temperature[t], k = kLog2e / tau;
    const int64_t y = target[t];
    const bool inside = y >= 0 && y < V;
    const int edge = rank == 0 ? span.edge(threadIdx.x) : V;
    const float x_edge = edge < V ? to_float(row[edge]) : -INFINITY;
    const float x_target = inside ? to_float(row[y]) : NAN;
    Sums sums = slice_sums<T>(chip, slice.count, k);
    if (edge < V) sums.add({x_edge}, k);
    sums = merge_cluster(sums, k, &mine, warps);  // nothing is stored before the whole row is on chip
    const RowStats stats(sums, tau, x_target);
    if (rank == 0 && threadIdx.x == 0) stats.store(t, logp, entropy, m, log_s);

    const float gh = dentropy != nullptr ? dentropy[t] : 0.f;
    const Gradient gradient(tau, stats.top, stats.ln, dlogp[t], gh, gh != 0.f ? stats.entropy : 0.f);
    Out* here = to + span.head + slice.first * kPack<T>;
    if (gradient.live) slice_gradient<Out, T>(here, chip, slice.count, gradient);
    else slice_gradient<Out, T>(here, chip, slice.count, None{});
    if (edge < V) assign(to[edge], gradient.live ? gradient(x_edge) : 0.f);
    cluster.sync();  // all blocks have read `mine`, and are done with their slices; the target's element is written last
    if (rank == 0 && threadIdx.x == 0 && inside) assign(to[y], gradient.at_target(x_target));
  }
#endif
}

// --- launch -------------------------------------------------------------------------------------------
int64_t slice_bytes(int64_t V, int64_t itemsize, int ranks) { return (V * itemsize / 16 + ranks - 1) / ranks * 16; }

// Bytes of shared memory that a CTA may ask for; 0 on a GPU without clusters.
int64_t most_shared(int device) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - kStatic;
  return major < 9 ? 0 : std::min<int64_t>(kMost, most / 16 * 16);
}

int cluster_size(int64_t V, int64_t itemsize, int64_t most) {
  int ranks = 1;
  while (ranks < kLargestCluster && slice_bytes(V, itemsize, ranks) > std::min(kSlice, most)) ranks *= 2;
  return ranks;
}

// Once per kernel and device, and always the same value: launches of two threads cannot lower it under each other.
void allow_shared(const void* kernel, std::once_flag (&once)[kDevices], int device, int64_t most) {
  FASTRL_CHECK(device < kDevices, "device", "below " + std::to_string(kDevices), device);
  std::call_once(once[device], [&] {
    const auto name = cudaFuncAttributeMaxDynamicSharedMemorySize;
    DeviceOf::check(cudaFuncSetAttribute(kernel, name, static_cast<int>(most)), "shared memory");
  });
}

template <class Out, class T>
void launch(Address out, const RowsAt& to, Address logits, const RowsAt& at, Address target, Address temperature,
            Address dlogp, Address dentropy, Address logp, Address entropy, Address m, Address log_s, int64_t rows,
            int64_t V, Address stream, int device) {
  static std::once_flag once[kDevices];
  const int64_t most = most_shared(device);
  const int ranks = cluster_size(V, sizeof(T), most);
  const int64_t shared = slice_bytes(V, sizeof(T), ranks);
  const auto kernel = fused<Out, T>;
  allow_shared(reinterpret_cast<const void*>(kernel), once, device, most);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = {static_cast<unsigned>(std::min<int64_t>(rows, 1 << 20) * ranks), 1, 1};
  config.blockDim = {kThreads, 1, 1};
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = array<CUstream_st>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  DeviceOf::check(
      cudaLaunchKernelEx(&config, kernel, array<Out>(out), to, static_cast<const T*>(array<T>(logits)), at,
                         array<const int64_t>(target), array<const float>(temperature), array<const float>(dlogp),
                         array<const float>(dentropy), array<float>(logp), array<float>(entropy), array<float>(m),
                         array<float>(log_s), rows, static_cast<int>(V)),
      "token_logp fused");
}

}  // namespace

int64_t token_logp_fused_limit(int code, int device) {
  return most_shared(device) * kLargestCluster / (code == kBFloat16 ? 2 : 4);
}

void token_logp_fused_cuda(Address out, int out_code, int64_t out_batch, int64_t out_row, Address logits, int code,
                           int64_t L, int64_t batch, int64_t row, Address target, Address temperature, Address dlogp,
                           Address dentropy, Address logp, Address entropy, Address m, Address log_s, int64_t T, int64_t V,
                           Address stream) {
  const RowsAt at{L, batch, row}, to{L, out_batch, out_row};
  check_rows(logits, code, at, T, V);
  check_out(out_code, code, to, T, V, dentropy, entropy);
  if (T == 0) return;
  const DeviceOf guard(array<void>(logits));
  const int64_t limit = token_logp_fused_limit(code, guard.device);
  FASTRL_CHECK(V <= limit, "V", "at most " + std::to_string(limit) + ", a row that fits a cluster of CTAs", V);
  const auto run = code == kBFloat16       ? launch<__nv_bfloat16, __nv_bfloat16>
                   : out_code == kBFloat16 ? launch<__nv_bfloat16, float>
                                           : launch<float, float>;
  run(out, to, logits, at, target, temperature, dlogp, dentropy, logp, entropy, m, log_s, T, V, stream, guard.device);
}

}  // namespace fastrl
