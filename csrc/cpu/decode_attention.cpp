// Attention of queries over paged keys and values; formula in kernels/decode_attention.py.
//
// A query takes its keys in blocks of kBlock positions, [64 i, 64 i + 64), in order, with an online softmax.  Nothing else decides
// the bits of its output: not the other queries, the place in the batch, where the pages lie, their size or the thread.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "../check.h"
#include "../ops.h"

namespace fastrl {

struct Group {  // one key head of one query's sequence, and the query heads that share it
  const void* q;       // (heads, width), `q_head` elements from one to the next
  const void *k, *v;   // the caches at this key head; `slot` elements from one token's to the next
  void* y;             // (heads, width), contiguous
  const int32_t* table;  // of pages
  int64_t q_head, slot, page, length, heads, width;
  float scale;
  float* scratch;
};

struct DecodeRows {
  void (*attend)(const Group& group);
  int64_t bytes;  // of an element
};

constexpr int64_t kBlock = 64;  // positions

}  // namespace fastrl

#define FASTRL_ROWS "decode_attention_rows.h"
#include "foreach_target.h"

namespace fastrl {
namespace {

constexpr int64_t kWidest = 16;  // floats of a vector

// what `attend` lays out in its scratch: see decode_attention_rows.h
int64_t scratch_floats(int64_t heads, int64_t width) {
  const int64_t padded = (width + kWidest - 1) / kWidest * kWidest;
  return heads * (2 * padded + kBlock + kWidest + 1) + 2 * kBlock * padded;
}

// Everything that is read through, before any thread reads through it.
void check_tables(const int32_t* table, int64_t stride, int64_t R, int64_t N, const int32_t* lengths, const int64_t* rows, int64_t B,
                  int64_t pages, int64_t page) {
  for (int64_t b = 0; b < B; b++) {
    const int64_t n = lengths[b], row = rows ? rows[b] : b;
    FASTRL_CHECK(n >= 0, "lengths", "at least 0 tokens", n);
    FASTRL_CHECK(n <= N * page, "lengths",
                 "at most " + std::to_string(N * page) + " tokens (" + std::to_string(N) + " pages of " + std::to_string(page) + ")", n);
    FASTRL_CHECK(n == 0 || (row >= 0 && row < R), "rows", "rows of block_table, in [0, " + std::to_string(R) + ")", row);
  }
  for (int64_t b = 0; b < B; b++) {
    const int64_t n = lengths[b], row = rows ? rows[b] : b;
    for (int64_t i = 0; i < (n + page - 1) / page; i++) {
      const int64_t at = table[row * stride + i];
      FASTRL_CHECK(at >= 0 && at < pages, "block_table", "pages in [0, " + std::to_string(pages) + ") where a length reaches", at);
    }
  }
}

}  // namespace

void decode_attention_cpu(Address y, Address q, int64_t q_token, int64_t q_head, int code, Address k_cache, Address v_cache,
                          Address block_table, int64_t table_stride, Address lengths, Address rows, double scale, int64_t B, int64_t R,
                          int64_t N, int64_t H, int64_t K, int64_t E, int64_t pages, int64_t page, int threads) {
  FASTRL_CHECK(code == kFloat32 || code == kBFloat16, "code", "0 (fp32) or 1 (bf16)", code);
  FASTRL_CHECK(B >= 0 && R >= 0 && N >= 0 && H >= 0 && pages >= 0, "B, R, N, H, pages", "at least 0", std::min({B, R, N, H, pages}));
  FASTRL_CHECK(K >= 1 && H % K == 0, "H", "a multiple of K=" + std::to_string(K), H);
  FASTRL_CHECK(E >= 1 && page >= 1, "E, page", "at least 1", std::min(E, page));
  FASTRL_CHECK(threads >= 1, "threads", "at least 1", threads);
  if (B == 0 || H == 0) return;  // an empty array may have no address
  FASTRL_CHECK(y && q && lengths, "y, q, lengths", "addresses", "0");
  FASTRL_CHECK(pages == 0 || (k_cache && v_cache), "k_cache, v_cache", "addresses", "0");
  FASTRL_CHECK(R == 0 || N == 0 || block_table, "block_table", "an address", "0");
  FASTRL_CHECK(rows || B == R, "lengths", "one of each row of block_table", B);
  const int32_t *table = reinterpret_cast<const int32_t*>(block_table), *length = reinterpret_cast<const int32_t*>(lengths);
  const int64_t* row_of = reinterpret_cast<const int64_t*>(rows);
  check_tables(table, table_stride, R, N, length, row_of, B, pages, page);
  const DecodeRows& kernel = FASTRL_CHOOSE(kDecodeRows)[code];
  const int64_t G = H / K, bytes = kernel.bytes;
  auto body = [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(scratch_floats(G, E));
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / K, h = i % K;
      Group group;
      group.q = reinterpret_cast<const char*>(q) + (b * q_token + h * G * q_head) * bytes;
      group.k = reinterpret_cast<const char*>(k_cache) + h * E * bytes;
      group.v = reinterpret_cast<const char*>(v_cache) + h * E * bytes;
      group.y = reinterpret_cast<char*>(y) + (b * H + h * G) * E * bytes;
      group.table = table + (row_of ? row_of[b] : b) * table_stride;
      group.q_head = q_head, group.slot = K * E, group.page = page, group.length = length[b], group.heads = G, group.width = E;
      group.scale = static_cast<float>(scale);
      group.scratch = scratch.data();
      kernel.attend(group);
    }
  };
  parallel(B * K, 8, threads, body);
}

}  // namespace fastrl
