#include "targets.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "../check.h"
#include "../ops.h"

namespace fastrl {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Isa best_isa() {
#if FASTRL_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

// --- threads ------------------------------------------------------------------------------------------
// GNU's entry point into a parallel region; LLVM's and Intel's runtimes export it too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// The OpenMP runtime that torch runs on, asked for through torch's own library: a second runtime would fight over the cores.
// Null until torch is loaded, and where torch has none (one thread then, which `fastrl env` shows).
GompParallel gomp() {
  static std::atomic<GompParallel> found{nullptr};
  if (GompParallel known = found.load(std::memory_order_acquire)) return known;
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = dlsym(torch != nullptr ? torch : RTLD_DEFAULT, "GOMP_parallel");
  if (torch != nullptr) dlclose(torch);  // only the count of RTLD_NOLOAD: torch stays loaded
  found.store(reinterpret_cast<GompParallel>(symbol), std::memory_order_release);
  return found.load(std::memory_order_acquire);
}

struct Region {
  void (*body)(void*, int64_t, int64_t);
  void* context;
  int64_t n, grain;
  std::atomic<int64_t> next{0};
};

void drain(void* address) {
  Region& region = *static_cast<Region*>(address);
  for (;;) {
    const int64_t begin = region.next.fetch_add(region.grain, std::memory_order_relaxed);
    if (begin >= region.n) return;
    region.body(region.context, begin, std::min(begin + region.grain, region.n));
  }
}

}  // namespace

Isa isa() {
  static const Isa best = best_isa();
  const char* asked = std::getenv("FASTRL_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return best;
  for (int i = 0; i <= static_cast<int>(best); i++) {
    if (std::string(asked) == kNames[i]) return static_cast<Isa>(i);
  }
  std::string have;
  for (const std::string& name : cpu_isas()) have += (have.empty() ? "" : " or ") + name;
  FASTRL_CHECK(false, "FASTRL_CPU_ISA", have + " on this processor", asked);
  return best;
}

std::string cpu_isa() { return kNames[static_cast<int>(isa())]; }

std::vector<std::string> cpu_isas() { return {kNames, kNames + static_cast<int>(best_isa()) + 1}; }

std::string threads_from() {
  Dl_info info{};
  const GompParallel enter = gomp();
  return enter != nullptr && dladdr(reinterpret_cast<void*>(enter), &info) != 0 ? info.dli_fname : "";
}

void parallel(int64_t n, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t useful = std::min<int64_t>(threads, (n + grain - 1) / grain);
  const GompParallel enter = useful > 1 ? gomp() : nullptr;
  if (enter == nullptr) {
    if (n > 0) body(context, 0, n);
    return;
  }
  Region region{body, context, n, grain};
  enter(drain, &region, static_cast<unsigned>(useful), 0);
}

}  // namespace fastrl
