// Generalised advantage estimation over packed sequences; formulas in kernels/gae.py.  Sums are double, threads share sequences.
#include <algorithm>
#include <cstdint>

#include "../check.h"
#include "../ops.h"

namespace fastrl {

using Gae = void (*)(const void* rewards, const void* values, const bool* live, void* advantages, void* returns, int64_t n,
                     double gamma, double decay);

}  // namespace fastrl

#define FASTRL_ROWS "gae_rows.h"
#include "foreach_target.h"

namespace fastrl {

void gae_cpu(Address reward, Address value, bool is_double, Address cu_seqlens, Address mask, double gamma, double lam,
             Address advantage, Address returns, int64_t T, int64_t S, int threads) {
  FASTRL_CHECK(T >= 0, "T", "at least 0", T);
  FASTRL_CHECK(S >= 0, "S", "at least 0", S);
  FASTRL_CHECK(threads >= 1, "threads", "at least 1", threads);
  FASTRL_CHECK(cu_seqlens, "cu_seqlens", "an address", "0");
  FASTRL_CHECK(T == 0 || (reward && value && advantage && returns), "reward, value, advantage, returns", "addresses", "0");
  check_ends("cu_seqlens", reinterpret_cast<const int64_t*>(cu_seqlens), S, T);
  const Gae sequence = FASTRL_CHOOSE(kGae)[is_double];
  const int64_t bytes = is_double ? sizeof(double) : sizeof(float);
  const int64_t* ends = reinterpret_cast<const int64_t*>(cu_seqlens);
  auto at = [&](Address x, int64_t t) { return reinterpret_cast<void*>(x + t * bytes); };
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; s++) {
      const int64_t first = ends[s];
      const bool* live = mask ? reinterpret_cast<const bool*>(mask) + first : nullptr;
      sequence(at(reward, first), at(value, first), live, at(advantage, first), at(returns, first), ends[s + 1] - first, gamma, gamma * lam);
    }
  };
  parallel(S, 1 + 8192 * S / std::max<int64_t>(T, 1), threads, body);
}

}  // namespace fastrl
