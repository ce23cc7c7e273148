// Advantages of samples within their groups; formulas in kernels/group_advantage.py.  The loops are in group_advantage_rows.h;
// here samples are brought side by side by their ids, and shared among threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "../check.h"
#include "../ops.h"

namespace fastrl {

enum Baseline : int { kMean, kLeaveOneOut, kMax, kNoBaseline };  // the order of the tables in kernels/group_advantage.py
enum Scale : int { kStd, kBatchStd, kRange, kNoScale };
enum Shape : int { kLinear, kRank, kSoftmax };

struct GroupOptions {
  int baseline, scale, shape;
  double eps, ddof, tau;
  double batch;  // the divisor that kBatchStd means
};

struct Groups {  // the functions of one element type
  void (*groups)(const void* reward, void* out, int64_t count, int64_t size, int64_t room, const GroupOptions& options);
  void (*scored)(const void* reward, int64_t n, double& count, double& sum);
  double (*centred)(const void* reward, int64_t n, double mean);
};

}  // namespace fastrl

#define FASTRL_ROWS "group_advantage_rows.h"
#include "foreach_target.h"

namespace fastrl {
namespace {

constexpr int64_t kBlock = 8192;  // samples of which a batch's moments are one part, whatever the number of threads
constexpr int64_t kSort = 512;    // members from which sorting is faster than comparing each with each

template <class T>
T* array(Address address) {
  return reinterpret_cast<T*>(address);
}

// Samples group after group, in their own order within one: `order` (S,) and where each group ends.
struct ByGroup {
  std::vector<int64_t> order, ends{0};
};

ByGroup by_group(const int64_t* ids, int64_t S) {
  ByGroup found;
  found.order.resize(S);
  std::iota(found.order.begin(), found.order.end(), 0);
  const auto [low, high] = std::minmax_element(ids, ids + S);
  const uint64_t span = static_cast<uint64_t>(*high) - static_cast<uint64_t>(*low);  // of ids that are hashes, beyond int64
  if (span < static_cast<uint64_t>(4 * S)) {  // count, then place
    std::vector<int64_t> place(span + 2);
    for (int64_t i = 0; i < S; i++) place[ids[i] - *low + 1]++;
    std::partial_sum(place.begin(), place.end(), place.begin());
    for (int64_t i = 0; i < S; i++) found.order[place[ids[i] - *low]++] = i;
  } else if (!std::is_sorted(ids, ids + S)) {
    std::stable_sort(found.order.begin(), found.order.end(), [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
  }
  for (int64_t i = 1; i < S; i++) {
    if (ids[found.order[i]] != ids[found.order[i - 1]]) found.ends.push_back(i);
  }
  found.ends.push_back(S);
  return found;
}

// Ranks of a group too large to compare each with each; formulas as in `ranks` of the rows.
template <class T>
void ranks_by_sorting(const T* x, T* out, int64_t n) {
  std::vector<std::pair<T, int64_t>> by_reward;
  for (int64_t i = 0; i < n; i++) {
    out[i] = 0;
    if (x[i] == x[i]) by_reward.push_back({x[i], i});
  }
  std::sort(by_reward.begin(), by_reward.end());
  const int64_t K = by_reward.size();
  if (K == 0 || by_reward[0].first == by_reward[K - 1].first) return;
  for (int64_t begin = 0, end; begin < K; begin = end) {
    for (end = begin + 1; end < K && by_reward[end].first == by_reward[begin].first;) end++;
    for (int64_t i = begin; i < end; i++) out[by_reward[i].second] = static_cast<T>((begin + end - 1.0) / (K - 1) - 1);
  }
}

template <class T>
class Job {
 public:
  Job(const T* reward, T* out, int64_t S, GroupOptions options, int threads)
      : reward_(reward), out_(out), S_(S), options_(options), threads_(threads), rows_(FASTRL_CHOOSE(kGroups)[sizeof(T) == 8]) {
    if (options.shape == kLinear && options.scale == kBatchStd) options_.batch = batch_std() + options.eps;
  }

  void of_size(int64_t size) {
    auto body = [&](int64_t begin, int64_t end) {
      run(reward_ + begin * size, out_ + begin * size, end - begin, size, S_ - begin * size);
    };
    parallel(S_ / size, 1 + 8192 / size, threads_, body);
  }

  void by_ids(const int64_t* ids) {
    const ByGroup by = by_group(ids, S_);
    auto body = [&](int64_t begin, int64_t end) {
      std::vector<T> x, a;
      for (int64_t g = begin; g < end; g++) {
        const int64_t first = by.ends[g], n = by.ends[g + 1] - first;
        x.resize(n), a.resize(n);
        for (int64_t i = 0; i < n; i++) x[i] = reward_[by.order[first + i]];
        run(x.data(), a.data(), 1, n, n);
        for (int64_t i = 0; i < n; i++) out_[by.order[first + i]] = a[i];
      }
    };
    const int64_t groups = by.ends.size() - 1;
    parallel(groups, 1 + 8192 * groups / S_, threads_, body);
  }

 private:
  void run(const T* x, T* out, int64_t count, int64_t size, int64_t room) const {
    if (options_.shape != kRank || size <= kSort) return rows_.groups(x, out, count, size, room, options_);
    for (int64_t i = 0; i < count * size; i += size) ranks_by_sorting(x + i, out + i, size);
  }

  double batch_std() const {
    const int64_t blocks = (S_ + kBlock - 1) / kBlock;
    std::vector<double> counts(blocks), sums(blocks);
    auto length = [&](int64_t b) { return std::min(kBlock, S_ - b * kBlock); };
    auto first = [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++) rows_.scored(reward_ + b * kBlock, length(b), counts[b], sums[b]);
    };
    parallel(blocks, 1, threads_, first);
    const double n = std::accumulate(counts.begin(), counts.end(), 0.0);
    const double mean = std::accumulate(sums.begin(), sums.end(), 0.0) / n;
    auto second = [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++) sums[b] = rows_.centred(reward_ + b * kBlock, length(b), mean);
    };
    parallel(blocks, 1, threads_, second);
    return std::sqrt(std::accumulate(sums.begin(), sums.end(), 0.0) / (n - options_.ddof));
  }

  const T* reward_;
  T* out_;
  int64_t S_;
  GroupOptions options_;
  int threads_;
  const Groups& rows_;
};

template <class T>
void advantages(Address reward, Address group, int64_t size, const GroupOptions& options, Address out, int64_t S, int threads) {
  Job<T> job(array<const T>(reward), array<T>(out), S, options, threads);
  if (group) job.by_ids(array<const int64_t>(group));
  else job.of_size(size);
}

}  // namespace

void group_advantage_cpu(Address reward, bool is_double, Address group, int64_t size, int baseline, int scale, int shape,
                         double eps, bool unbiased, double tau, Address out, int64_t S, int threads) {
  FASTRL_CHECK(S >= 0, "S", "at least 0", S);
  FASTRL_CHECK(S == 0 || group || (size >= 1 && S % size == 0), "size", "a divisor of S, or group ids", size);
  FASTRL_CHECK(baseline >= kMean && baseline <= kNoBaseline, "baseline", "0 to 3", baseline);
  FASTRL_CHECK(scale >= kStd && scale <= kNoScale, "scale", "0 to 3", scale);
  FASTRL_CHECK(shape >= kLinear && shape <= kSoftmax, "shape", "0 to 2", shape);
  FASTRL_CHECK(threads >= 1, "threads", "at least 1", threads);
  FASTRL_CHECK(S == 0 || (reward && out), "reward, out", "addresses", "0");
  if (S == 0) return;
  const GroupOptions options{baseline, scale, shape, eps, unbiased ? 1.0 : 0.0, tau, 0};
  (is_double ? advantages<double> : advantages<float>)(reward, group, size, options, out, S, threads);
}

}  // namespace fastrl
