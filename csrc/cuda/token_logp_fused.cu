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
#include <cooperative_groups.h>

#include <algorithm>

#include "token_logp.cuh"

namespace fastrl {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 512, kWarps = kThreads / 32, kStages = 4, kLargestCluster = 8;
constexpr int64_t kSlice = 108 << 10, kMost = 220 << 10;

struct Shares {  // what a CTA tells its cluster
  float top, s, a, x;  // x: the target's logit, 0 where it lies in another slice
};

// Packs of a row, counted from the 16-byte boundary at or before its first element.
template <class T>
struct Slice {
  static constexpr int kSize = Pack<T>::kSize;
  const T* start;      // that boundary
  int64_t pad, end;    // the row is start[pad .. end)
  int64_t first, count;  // packs of this CTA

  __device__ Slice(const T* row, int64_t V, int rank, int ranks) {
    pad = static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(row) % 16 / sizeof(T));
    start = row - pad, end = pad + V;
    const int64_t packs = (end + kSize - 1) / kSize, each = (packs + ranks - 1) / ranks;
    first = rank * each;
    count = first < packs ? (packs - first < each ? packs - first : each) : 0;
  }
  __device__ int64_t element(int64_t i) const { return (first + i) * kSize; }  // of its pack i, counted from `start`
  __device__ bool whole(int64_t i) const { return element(i) >= pad && element(i) + kSize <= end; }
};

template <class T>
__device__ void fetch(Pack<T>* chip, const Slice<T>& slice) {
  const int64_t each = (slice.count + kStages - 1) / kStages;
#pragma unroll
  for (int stage = 0; stage < kStages; stage++) {
    const int64_t stop = each * (stage + 1) < slice.count ? each * (stage + 1) : slice.count;
    for (int64_t i = each * stage + threadIdx.x; i < stop; i += kThreads) {
      const int64_t e = slice.element(i);
      if (slice.whole(i)) {
        copy_async(&chip[i], slice.start + e);
        continue;
      }
      for (int j = 0; j < Pack<T>::kSize; j++) {
        const bool inside = e + j >= slice.pad && e + j < slice.end;
        if (inside) chip[i].at[j] = slice.start[e + j];
        else assign(chip[i].at[j], -INFINITY);
      }
    }
    close_copies();
  }
}

template <class T>
__device__ void add_stage(Sums& sums, const Pack<T>* chip, int64_t count, int stage, float k) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t each = (count + kStages - 1) / kStages;
  const int64_t stop = each * (stage + 1) < count ? each * (stage + 1) : count;
  for (int64_t i = each * stage + threadIdx.x; i < stop; i += kThreads) {
    const Pack<T> pack = chip[i];
    float x[kSize];
#pragma unroll
    for (int j = 0; j < kSize; j++) x[j] = to_float(pack.at[j]);
    sums.add(x, k);
  }
}

template <class T>
__device__ Sums slice_sums(const Pack<T>* chip, int64_t count, float k) {
  static_assert(kStages == 4, "a wait for each stage");
  Sums sums;
  wait_copies<3>(), add_stage(sums, chip, count, 0, k);
  wait_copies<2>(), add_stage(sums, chip, count, 1, k);
  wait_copies<1>(), add_stage(sums, chip, count, 2, k);
  wait_copies<0>(), add_stage(sums, chip, count, 3, k);
  return sums;
}

// The sums of the whole row, in every thread of the cluster, and the target's logit (NaN for a target outside [0, V)).
__device__ Sums merge_cluster(Sums sums, float x_mine, bool inside, float k, Shares* mine, float (*warps)[kWarps], float& x) {
  const auto cluster = cg::this_cluster();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  sums.merge_warp(32, k);
  if (lane == 0) warps[0][warp] = sums.top, warps[1][warp] = sums.s, warps[2][warp] = sums.a;
  __syncthreads();
  if (warp == 0) {
    const int w = lane % kWarps;
    sums.top = warps[0][w], sums.s = warps[1][w], sums.a = warps[2][w];
    sums.merge_warp(kWarps, k);
    if (lane == 0) *mine = {sums.top, sums.s, sums.a, x_mine};
  }
  cluster.sync();
  Sums all;
  x = 0;
  for (unsigned r = 0; r < cluster.num_blocks(); r++) {
    const Shares share = *cluster.map_shared_rank(mine, r);
    all.merge(share.top, share.s, share.a, k);
    x += share.x;
  }
  x = inside ? x : NAN;
  return all;
}

template <class Out, class T>
__device__ void store_gradient(Out* out, const Pack<T>* chip, const Slice<T>& slice, const Gradient& gradient, int64_t target) {
  constexpr int kSize = Pack<T>::kSize;
  Out* base = out - slice.pad;  // element e of the slice goes to base[e]
  const bool wide = reinterpret_cast<std::uintptr_t>(base) % sizeof(Pack<Out, kSize>) == 0;
  for (int64_t i = threadIdx.x; i < slice.count; i += kThreads) {
    const int64_t e = slice.element(i);
    const Pack<T> pack = chip[i];
    Pack<Out, kSize> moved;
#pragma unroll
    for (int j = 0; j < kSize; j++) {
      const float x = to_float(pack.at[j]);
      assign(moved.at[j], e + j == target ? gradient.at_target(x) : gradient(x));
    }
    if (slice.whole(i)) {
      store_pack(base + e, moved, wide);
      continue;
    }
#pragma unroll
    for (int j = 0; j < kSize; j++) {
      if (e + j >= slice.pad && e + j < slice.end) base[e + j] = moved.at[j];
    }
  }
}

template <class Out, class T>
__global__ void __launch_bounds__(kThreads, 2)
    fused(Out* out, RowsAt out_at, const T* logits, RowsAt at, const int64_t* target, const float* temperature,
          const float* dlogp, const float* dentropy, float* logp, float* entropy, float* m, float* log_s, int64_t rows,
          int64_t V) {
  extern __shared__ __align__(16) unsigned char bytes[];
  __shared__ float warps[3][kWarps];
  __shared__ Shares mine;
  auto* chip = reinterpret_cast<Pack<T>*>(bytes);
  const auto cluster = cg::this_cluster();
  const int ranks = static_cast<int>(cluster.num_blocks()), rank = static_cast<int>(cluster.block_rank());
  for (int64_t t = blockIdx.x / ranks; t < rows; t += gridDim.x / ranks) {
    const Slice<T> slice(logits + at(t), V, rank, ranks);
    fetch(chip, slice);
    const float tau = temperature[t], k = kLog2e / tau;
    const int64_t y = target[t], y_at = y + slice.pad;  // counted from `start`
    const bool inside = y >= 0 && y < V;
    const bool here = inside && y_at >= slice.element(0) && y_at < slice.element(slice.count);
    const float x_mine = here && threadIdx.x == 0 ? to_float(slice.start[y_at]) : 0.f;
    float x;
    const Sums sums = merge_cluster(slice_sums(chip, slice.count, k), x_mine, inside, k, &mine, warps, x);
    const RowStats stats(sums, tau, x);
    if (rank == 0 && threadIdx.x == 0) stats.store(t, logp, entropy, m, log_s);
    const float gh = dentropy != nullptr ? dentropy[t] : 0.f;
    const Gradient gradient(tau, stats.top, stats.ln, dlogp[t], gh, gh != 0.f ? stats.entropy : 0.f);
    store_gradient(out + out_at(t), chip, slice, gradient, inside ? y_at : -1);
    cluster.sync();  // all blocks have read `mine`, and are done with their slices
  }
}

// --- launch -------------------------------------------------------------------------------------------
int64_t slice_bytes(int64_t V, int64_t itemsize, int ranks) {  // a row may begin anywhere in its first pack
  const int64_t packs = (V * itemsize + 15) / 16 + 1;
  return (packs + ranks - 1) / ranks * 16;
}

int cluster_size(int64_t V, int64_t itemsize) {
  int ranks = 1;
  while (ranks < kLargestCluster && slice_bytes(V, itemsize, ranks) > kSlice) ranks *= 2;
  return ranks;
}

template <class Out, class T>
void launch(Address out, const RowsAt& to, Address logits, const RowsAt& at, Address target, Address temperature,
            Address dlogp, Address dentropy, Address logp, Address entropy, Address m, Address log_s, int64_t rows,
            int64_t V, Address stream) {
  const int ranks = cluster_size(V, sizeof(T));
  const int64_t shared = slice_bytes(V, sizeof(T), ranks);
  const auto kernel = fused<Out, T>;
  DeviceOf::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), "shared");
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
                         array<float>(log_s), rows, V),
      "token_logp fused");
}

}  // namespace

int64_t token_logp_fused_limit(int code) {
  return (kMost / 16 * kLargestCluster - 1) * 16 / (code == kBFloat16 ? 2 : 4);
}

void token_logp_fused_cuda(Address out, int out_code, int64_t out_batch, int64_t out_row, Address logits, int code,
                           int64_t L, int64_t batch, int64_t row, Address target, Address temperature, Address dlogp,
                           Address dentropy, Address logp, Address entropy, Address m, Address log_s, int64_t T, int64_t V,
                           Address stream) {
  const RowsAt at{L, batch, row}, to{L, out_batch, out_row};
  check_rows(logits, code, at, T, V);
  check_out(out_code, code, to, T, V, dentropy, entropy);
  FASTRL_CHECK(V <= token_logp_fused_limit(code), "V",
               "at most " + std::to_string(token_logp_fused_limit(code)) + ", a row that fits a cluster of CTAs", V);
  if (T == 0) return;
  const DeviceOf guard(array<void>(logits));
  const auto run = code == kBFloat16       ? launch<__nv_bfloat16, __nv_bfloat16>
                   : out_code == kBFloat16 ? launch<__nv_bfloat16, float>
                                           : launch<float, float>;
  run(out, to, logits, at, target, temperature, dlogp, dentropy, logp, entropy, m, log_s, T, V, stream);
}

}  // namespace fastrl
