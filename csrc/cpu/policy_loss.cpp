// The policy loss of packed tokens: loss, both derivatives and all metrics in one pass; formulas in kernels/policy_loss.py.
//
// Tokens are taken in chunks of a fixed size whose sums are added in order, so that no result depends on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../check.h"
#include "../ops.h"

namespace fastrl {

constexpr int kPolicySurrogates = 8, kPolicyKls = 7;

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

}  // namespace fastrl

#define FASTRL_ROWS "policy_loss_rows.h"
#include "foreach_target.h"

namespace fastrl {
namespace {

constexpr int64_t kChunk = 4096;  // tokens whose sums are one entry of the second stage; every block size divides it

// Each sequence's mean of logp - old_logp over live tokens, written for each of its tokens.
void sequence_means(const PolicyColumns& c, const int64_t* ends, int64_t S, float* mean, int threads) {
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; s++) {
      double sum = 0, n = 0;
      for (int64_t t = ends[s]; t < ends[s + 1]; t++) {
        const bool live = !c.mask || c.mask[t];
        sum += live ? c.logp[t] - c.old_logp[t] : 0.0f;
        n += live;
      }
      std::fill(mean + ends[s], mean + ends[s + 1], static_cast<float>(sum / std::max(n, 1.0)));
    }
  };
  parallel(S, 1, threads, body);
}

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
  PolicyColumns c = {array<float>(logp), array<float>(entropy), array<float>(old_logp), array<float>(advantage), array<float>(weight),
                     array<float>(ref_logp), array<float>(correction), nullptr, array<unsigned char>(mask), array<float>(dlogp),
                     array<float>(dentropy)};
  if (ends) {  // the means travel in dlogp, where each is read before the derivative takes its place
    sequence_means(c, array<const int64_t>(ends), S, c.dlogp, threads);
    c.mean = c.dlogp;
  }
  const PolicyOptions o = {surrogate, kl, params.data(), kl_coef, entropy_coef};
  const auto rows = FASTRL_CHOOSE(kTokenRows);
  const int64_t chunks = (T + kChunk - 1) / kChunk;
  std::vector<double> partial(chunks * kPolicySums);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) rows(c, o, i * kChunk, std::min((i + 1) * kChunk, T), &partial[i * kPolicySums]);
  };
  parallel(chunks, 1, threads, body);
  finish(partial, array<float>(loss), array<float>(metrics));
}

}  // namespace fastrl
