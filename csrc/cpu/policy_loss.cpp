// The policy loss of packed tokens: loss, both derivatives and all metrics in one pass; formulas in kernels/policy_loss.py.
//
// Tokens are taken in chunks of a fixed size, with sums added in order, so that no result depends on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../check.h"
#include "../ops.h"

namespace fastrl {

constexpr int kPolicySurrogates = 8, kPolicyKls = 9;

// The metrics in the order of METRICS (kernels/_policy_metrics.py).  The last is made of two others: its place holds the loss.
enum PolicySum {
  kTokens, kClipLow, kClipHigh, kClipCap, kRatio, kRatioMax, kSquare, kOldK1, kOldK3, kRefK1, kRefK3, kEntropy, kAdvantage,
  kWeight, kWeightSquare, kLoss, kPolicySums
};

struct PolicyColumns {  // (T,) vectors, 0 where absent
  const float *logp, *entropy, *old_logp, *advantage, *weight, *ref_logp, *correction, *mean;
  const unsigned char* mask;
  float *dlogp, *dentropy;
};

struct PolicyOptions {
  int surrogate, kl;  // kl < 0: none
  const double* params;
  double kl_coef, entropy_coef;
};

struct PolicyRows {
  void (*tokens)(const PolicyColumns& columns, const PolicyOptions& options, int64_t begin, int64_t end, double* sums);
  float (*mean_drift)(const PolicyColumns& columns, int64_t begin, int64_t end);
};

}  // namespace fastrl

#define FASTRL_ROWS "policy_loss_rows.h"
#include "foreach_target.h"

namespace fastrl {
namespace {

constexpr int64_t kChunk = 4096;  // tokens summed to one entry of the second stage; every block size divides it

void finish(const std::vector<double>& partial, float* loss, float* metrics) {
  double sums[kPolicySums] = {};
  for (size_t i = 0; i < partial.size(); i += kPolicySums) {
    for (int k = 0; k < kPolicySums; k++) sums[k] = k == kRatioMax ? std::max(sums[k], partial[i + k]) : sums[k] + partial[i + k];
  }
  *loss = static_cast<float>(sums[kLoss]);
  const double n = std::max(sums[kTokens], 1.0), weight = sums[kWeight] / n;
  for (int k = 0; k < kPolicySums; k++) metrics[k] = static_cast<float>(sums[k] / n);
  metrics[kTokens] = static_cast<float>(sums[kTokens]);
  metrics[kRatioMax] = std::isnan(sums[kRatio]) ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(sums[kRatioMax]);
  metrics[kLoss] = sums[kTokens] > 0 ? static_cast<float>(weight * weight * n / sums[kWeightSquare]) : 0;  // ess
}

template <class T>
T* array(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void policy_loss_cpu(Address logp, Address entropy, Address old_logp, Address advantage, Address weight, Address ref_logp,
                     Address correction, Address mask, Address ends, int64_t S, Address loss, Address metrics, Address dlogp,
                     Address dentropy, int surrogate, const std::vector<double>& params, int kl, double kl_coef,
                     double entropy_coef, int64_t T, int threads) {
  FASTRL_CHECK(T >= 0, "T", "at least 0", T);
  FASTRL_CHECK(threads >= 1, "threads", "at least 1", threads);
  FASTRL_CHECK(surrogate >= 0 && surrogate < kPolicySurrogates, "surrogate", "the cpu_id of a row of SURROGATES", surrogate);
  FASTRL_CHECK(kl < kPolicyKls, "kl", "the place of a row of KLS, or -1", kl);
  FASTRL_CHECK(params.size() == 3, "params", "3, filled up with 0", params.size());
  FASTRL_CHECK(T == 0 || (logp && old_logp && advantage && weight && dlogp), "logp, old_logp, advantage, weight, dlogp", "addresses", "0");
  FASTRL_CHECK(kl < 0 || ref_logp || T == 0, "ref_logp", "an address, because kl is given", "0");
  FASTRL_CHECK(!entropy || dentropy || T == 0, "dentropy", "an address, because entropy has one", "0");
  FASTRL_CHECK(loss && metrics, "loss, metrics", "addresses", "0");
  if (ends) check_ends("cu_seqlens", array<const int64_t>(ends), S, T);
  PolicyColumns c = {array<float>(logp), array<float>(entropy), array<float>(old_logp), array<float>(advantage), array<float>(weight),
                     array<float>(ref_logp), array<float>(correction), nullptr, array<unsigned char>(mask), array<float>(dlogp),
                     array<float>(dentropy)};
  const PolicyRows rows = FASTRL_CHOOSE(kPolicy);
  if (ends) {  // the means travel in dlogp, where each is read before the derivative takes its place
    auto means = [&, cu = array<const int64_t>(ends)](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; s++) std::fill(c.dlogp + cu[s], c.dlogp + cu[s + 1], rows.mean_drift(c, cu[s], cu[s + 1]));
    };
    parallel(S, 1, threads, means);
    c.mean = c.dlogp;
  }
  const PolicyOptions o = {surrogate, kl, params.data(), kl_coef, entropy_coef};
  const int64_t chunks = (T + kChunk - 1) / kChunk;
  std::vector<double> partial(chunks * kPolicySums);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) rows.tokens(c, o, i * kChunk, std::min((i + 1) * kChunk, T), &partial[i * kPolicySums]);
  };
  parallel(chunks, 1, threads, body);
  finish(partial, array<float>(loss), array<float>(metrics));
}

}  // namespace fastrl
