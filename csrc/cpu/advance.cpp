// The end of a decode step: the draw is recorded and every row moves on; formulas in kernels/advance.py.
#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "../check.h"
#include "../ops.h"

namespace fastrl {
namespace {

template <class T>
T* array(Address address) {
  return reinterpret_cast<T*>(address);
}

bool absent(Address address) { return address == 0; }

std::string below(int64_t end) { return "in [0, " + std::to_string(end) + ")"; }

}  // namespace

void advance_cpu(const std::vector<Address>& draw, const std::vector<Address>& rows, const std::vector<Address>& records,
                 const std::vector<Address>& pages, Address stops, int64_t n_stops, int64_t version, Address total, int64_t B,
                 int64_t N, int64_t S, int64_t C, int64_t P, int64_t page) {
  FASTRL_CHECK(draw.size() == 4 && rows.size() == 8 && records.size() == 8 && pages.size() == 3, "draw, rows, records, pages",
               "4, 8, 8 and 3 addresses", "another number");
  FASTRL_CHECK(B >= 0 && N >= 0 && S >= 0 && C >= 0 && P >= 0 && n_stops >= 0, "B, N, S, C, P, stops", "at least 0",
               std::min({B, N, S, C, P, n_stops}));
  FASTRL_CHECK(page >= 1, "page", "at least 1", page);
  if (B == 0) return;
  const auto missing = [](const std::vector<Address>& some) { return std::any_of(some.begin(), some.end(), absent); };
  FASTRL_CHECK(!missing(draw) && !missing({rows.begin(), rows.end() - (N == 0)}) && !missing(records) && !missing(pages) && total,
               "draw, rows, records, pages, total", "addresses", "0");
  FASTRL_CHECK(n_stops == 0 || stops, "stops", "an address", "0");
  const int64_t *token = array<int64_t>(draw[0]), *seq = array<int64_t>(rows[0]);
  int64_t *length = array<int64_t>(rows[1]), *drawn = array<int64_t>(rows[2]), *last = array<int64_t>(rows[5]);
  const int64_t *budget = array<int64_t>(rows[3]), *until = array<int64_t>(rows[4]);
  bool* alive = array<bool>(rows[6]);
  int32_t *table = array<int32_t>(rows[7]), *free = array<int32_t>(pages[0]), *refs = array<int32_t>(pages[2]);
  int64_t &top = *array<int64_t>(pages[1]), &count = *array<int64_t>(total);
  const int64_t *stop = array<const int64_t>(stops), *last_stop = stop + n_stops;
  const auto reason = [&](int64_t b) {  // for which row b ends with its draw; 0 where it goes on
    if (std::find(stop, last_stop, token[b]) != last_stop) return 1;
    return drawn[b] + 1 >= budget[b] || length[b] + 1 >= until[b] ? 2 : 0;
  };
  int64_t needy = 0;  // rows that get a page
  for (int64_t b = 0; b < B; b++) {  // all that is written through, before anything is
    if (!alive[b]) continue;
    FASTRL_CHECK(seq[b] >= 0 && seq[b] < S, "rows.seq", below(S) + ", a row of the records", seq[b]);
    FASTRL_CHECK(length[b] >= 0 && length[b] < C, "rows.length", below(C) + ", a column of the records", length[b]);
    FASTRL_CHECK(length[b] % page || length[b] / page < N, "rows.table", std::to_string(length[b] / page + 1) + " columns", N);
    needy += length[b] % page == 0 && reason(b) == 0;
  }
  FASTRL_CHECK(needy == 0 || (top >= needy && top <= P), "pages.top", "a free page for each of " + std::to_string(needy) + " rows", top);
  for (int64_t i = top - needy; i < top; i++) FASTRL_CHECK(free[i] >= 0 && free[i] < P, "pages.free", below(P), free[i]);
  for (int64_t b = 0; b < B; b++) {
    if (!alive[b]) continue;
    const int64_t at = length[b], place = seq[b] * C + at;
    const int ended = reason(b);
    array<int64_t>(records[0])[place] = last[b] = token[b];
    for (int i = 1; i < 4; i++) array<float>(records[i])[place] = array<const float>(draw[i])[b];
    array<bool>(records[4])[place] = true;
    array<int32_t>(records[5])[place] = static_cast<int32_t>(version);
    array<int64_t>(records[6])[seq[b]] = length[b] = at + 1;
    drawn[b]++, count++;
    array<int8_t>(records[7])[seq[b]] = static_cast<int8_t>(ended);
    alive[b] = ended == 0;
    if (ended || at % page) continue;
    refs[table[b * N + at / page] = free[--top]] = 1;
  }
}

std::array<int64_t, 2> need_cpu(Address alive, Address length, Address until, int64_t B, int64_t page) {
  FASTRL_CHECK(B >= 0, "B", "at least 0", B);
  FASTRL_CHECK(page >= 1, "page", "at least 1", page);
  FASTRL_CHECK(B == 0 || (alive && length && until), "alive, length, until", "addresses", "0");
  std::array<int64_t, 2> found = {};
  for (int64_t b = 0; b < B; b++) {
    if (!array<const bool>(alive)[b]) continue;
    found[0]++;
    found[1] += (array<const int64_t>(until)[b] - 2) / page - (array<const int64_t>(length)[b] - 1) / page;
  }
  return found;
}

}  // namespace fastrl
