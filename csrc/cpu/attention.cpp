// Causal attention of packed sequences and its gradients; formulas in kernels/attention.py.
//
// The queries of a sequence that share a key head are rows, token by token and in it head by head; a tile is kAttentionRows of them,
// counted from the sequence's start, over kAttentionKeys keys at a time, counted from there too.  Keys and values are copied, the keys
// turned, a sequence and a key head at a time.  The sums of an output, of a gradient and of a softmax run in the order of these tiles:
// neither the other sequences nor the threads decide a bit.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../check.h"
#include "../ops.h"

namespace fastrl {

constexpr int64_t kAttentionRows = 96;
constexpr int64_t kAttentionKeys = 128;
constexpr int64_t kAttentionWidth = 256;  // the widest head

struct AttentionView {  // rows of contiguous elements
  void* at;
  int64_t token, head;  // elements from one to the next
};

struct AttentionTile {  // rows [first, first + rows) of a sequence's queries at one key head
  AttentionView q, dy, y, out;  // of the sequence, at the first of the heads; `out` is y or dq
  float* lse;                   // `all_heads` from one token to the next; in the forward it may be absent
  const float *k_turned, *v_turned, *k, *v;
  float *dk, *dv;  // added to
  int64_t first, rows, heads, all_heads, past, width;
  float scale;
  float* scratch;
  const AttentionTile* next;  // whose queries are fetched meanwhile; may be absent
};

struct AttentionRows {
  void (*turn)(float* out, const AttentionView& x, int64_t first, int64_t n, int64_t width);
  void (*lay)(float* out, const AttentionView& x, int64_t first, int64_t n, int64_t width);
  void (*forward)(const AttentionTile& tile);
  void (*backward)(const AttentionTile& tile);
  void (*join)(void* out, const float* const* shares, int64_t count, int64_t j, int64_t width, bool of_keys);
  int64_t bytes, lanes;
};

}  // namespace fastrl

#define FASTRL_ROWS "attention_rows.h"
#include "foreach_target.h"

namespace fastrl {
namespace {

constexpr int64_t kScratch = kAttentionRows * (3 * (kAttentionWidth + 16) + 2 * (kAttentionKeys + 16)) + 64;
constexpr int64_t kTogether = 1 << 16;  // floats of keys and values copied at once for each thread: they stay in its L2
constexpr int64_t kShare = 16;          // tiles whose gradients of keys and values are added up in one place
constexpr int64_t kCopied = 64;         // keys copied by one thread, a multiple of any panel

struct Call {
  const AttentionRows& rows;
  AttentionView q, k, v, dy, y, out, dk, dv;
  float* lse;
  const int64_t *ends, *ends_k;
  int64_t S, H, K, E;
  float scale;
  int threads;
  bool backward;
};

struct Pair {  // a sequence at a key head
  int64_t first, queries, first_k, keys, head, tiles, blocks, copies, shares;  // copies, shares: where its floats begin
};

AttentionView moved(AttentionView x, int64_t bytes, int64_t token, int64_t head) {
  x.at = static_cast<char*>(x.at) + (token * x.token + head * x.head) * bytes;
  return x;
}

struct Sizes {
  int64_t panels, padded, turned, laid, copies;  // of a pair of `keys` keys

  Sizes(const Call& c, int64_t keys) {
    panels = (keys + kCopied - 1) / kCopied * kCopied;
    padded = (c.E + c.rows.lanes - 1) / c.rows.lanes * c.rows.lanes;
    turned = panels * c.E, laid = keys * padded;
    copies = (turned + laid + (c.backward ? turned : 0) + 15) / 16 * 16;
  }
};

class Floats {  // room that is not cleared
 public:
  float* data() const { return floats_.get(); }
  void reserve(int64_t n) {
    if (n > room_) floats_.reset(new float[room_ = n]);
  }

 private:
  std::unique_ptr<float[]> floats_;
  int64_t room_ = 0;
};

// Pairs that are worked on together.
struct Group {
  std::vector<Pair> pairs;
  std::vector<int64_t> blocks, tiles, shares;  // before each pair, and all at the end
  int64_t copied = 0, summed = 0;              // floats
  Floats copies, sums;
};

int64_t share_keys(const Call& c, const Pair& p, int64_t share) {
  const int64_t rows = std::min((share + 1) * kShare * kAttentionRows, p.queries * (c.H / c.K));
  return p.keys - p.queries + (rows - 1) / (c.H / c.K) + 1;
}

int64_t find(const std::vector<int64_t>& before, int64_t i) {
  return std::upper_bound(before.begin(), before.end(), i) - before.begin() - 1;
}

void copy(const Call& c, Group& g) {
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Pair& p = g.pairs[find(g.blocks, i)];
      const Sizes size(c, p.keys);
      const int64_t first = (i - g.blocks[&p - g.pairs.data()]) * kCopied, n = std::min(kCopied, p.keys - first);
      const AttentionView k = moved(c.k, c.rows.bytes, p.first_k, p.head), v = moved(c.v, c.rows.bytes, p.first_k, p.head);
      float *turned = g.copies.data() + p.copies, *laid = turned + size.turned * (c.backward ? 2 : 1);
      c.rows.turn(turned + first * c.E, k, first, n, c.E);
      if (c.backward) c.rows.turn(turned + size.turned + first * c.E, v, first, n, c.E);
      c.rows.lay(laid + first * size.padded, c.backward ? k : v, first, n, c.E);
    }
  };
  parallel(g.blocks.back(), 1, c.threads, body);
}

AttentionTile tile_of(const Call& c, const Group& g, const Pair& p) {
  const int64_t heads = c.H / c.K, bytes = c.rows.bytes, h = p.head * heads;
  const Sizes size(c, p.keys);
  AttentionTile t{};
  t.q = moved(c.q, bytes, p.first, h), t.out = moved(c.out, bytes, p.first, h);
  if (c.backward) t.dy = moved(c.dy, bytes, p.first, h), t.y = moved(c.y, bytes, p.first, h);
  t.lse = c.lse ? c.lse + p.first * c.H + h : nullptr;
  t.k_turned = g.copies.data() + p.copies;
  if (c.backward) {
    t.v_turned = t.k_turned + size.turned, t.k = t.v_turned + size.turned;
  } else {
    t.v = t.k_turned + size.turned;
  }
  t.heads = heads, t.all_heads = c.H, t.past = p.keys - p.queries, t.width = c.E, t.scale = c.scale;
  return t;
}

float* scratch() {
  static thread_local std::vector<float> floats(kScratch);
  return floats.data() + (16 - reinterpret_cast<uintptr_t>(floats.data()) / 4 % 16) % 16;  // a cache line's start
}

AttentionTile forward_tile(const Call& c, const Group& g, int64_t i) {
  const int64_t at = find(g.tiles, i);
  const Pair& p = g.pairs[at];
  AttentionTile t = tile_of(c, g, p);
  t.first = (i - g.tiles[at]) * kAttentionRows;
  t.rows = std::min(kAttentionRows, p.queries * t.heads - t.first);
  return t;
}

void forward(const Call& c, Group& g) {
  copy(c, g);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t last = g.tiles.back() - 1 - i;  // the last tiles take longest: they come first
      AttentionTile t = forward_tile(c, g, last);
      const AttentionTile next = forward_tile(c, g, std::max<int64_t>(last - 1, 0));
      t.scratch = scratch(), t.next = last > 0 ? &next : nullptr;
      c.rows.forward(t);
    }
  };
  parallel(g.tiles.back(), 1, c.threads, body);
}

void backward(const Call& c, Group& g) {
  copy(c, g);
  auto shares = [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; i--) {
      const int64_t at = find(g.shares, g.shares.back() - 1 - i), share = g.shares.back() - 1 - i - g.shares[at];
      const Pair& p = g.pairs[at];
      AttentionTile t = tile_of(c, g, p);
      t.scratch = scratch();
      float* sums = g.sums.data() + p.shares;
      const int64_t padded = Sizes(c, p.keys).padded;
      for (int64_t s = 0; s < share; s++) sums += 2 * share_keys(c, p, s) * padded;
      t.dk = sums, t.dv = sums + share_keys(c, p, share) * padded;
      std::fill(t.dk, t.dk + 2 * share_keys(c, p, share) * padded, 0.0f);
      for (int64_t tile = share * kShare; tile < std::min((share + 1) * kShare, p.tiles); tile++) {
        t.first = tile * kAttentionRows;
        t.rows = std::min(kAttentionRows, p.queries * t.heads - t.first);
        c.rows.backward(t);
      }
    }
  };
  parallel(g.shares.back(), 1, c.threads, shares);
  auto joins = [&](int64_t begin, int64_t end) {
    std::vector<const float*> dk, dv;
    for (int64_t i = begin; i < end; i++) {
      const int64_t at = find(g.blocks, i), first = (i - g.blocks[at]) * kCopied;
      const Pair& p = g.pairs[at];
      const int64_t padded = Sizes(c, p.keys).padded, count = g.shares[at + 1] - g.shares[at];
      for (int64_t j = first; j < std::min(first + kCopied, p.keys); j++) {
        dk.clear(), dv.clear();
        const float* sums = g.sums.data() + p.shares;
        for (int64_t s = 0; s < count; s++) {
          const int64_t keys = share_keys(c, p, s);
          if (j < keys) dk.push_back(sums), dv.push_back(sums + keys * padded);
          sums += 2 * keys * padded;
        }
        c.rows.join(moved(c.dk, c.rows.bytes, p.first_k + j, p.head).at, dk.data(), dk.size(), j, c.E, true);
        c.rows.join(moved(c.dv, c.rows.bytes, p.first_k + j, p.head).at, dv.data(), dv.size(), j, c.E, false);
      }
    }
  };
  parallel(g.blocks.back(), 1, c.threads, joins);
}

void run(const Call& c, Group& g) {
  if (g.pairs.empty()) return;
  g.copies.reserve(g.copied), g.sums.reserve(g.summed);
  (c.backward ? backward : forward)(c, g);
  g.pairs.clear();
}

void add(const Call& c, Group& g, Pair p) {
  if (g.pairs.empty()) g.blocks = g.tiles = g.shares = {0}, g.copied = g.summed = 0;
  p.tiles = (p.queries * (c.H / c.K) + kAttentionRows - 1) / kAttentionRows;
  p.blocks = (p.keys + kCopied - 1) / kCopied;
  p.copies = g.copied, p.shares = g.summed;
  const Sizes size(c, p.keys);
  const int64_t shares = c.backward ? (p.tiles + kShare - 1) / kShare : 0;
  for (int64_t s = 0; s < shares; s++) g.summed += 2 * share_keys(c, p, s) * size.padded;
  g.copied += size.copies;
  g.blocks.push_back(g.blocks.back() + p.blocks);
  g.tiles.push_back(g.tiles.back() + p.tiles);
  g.shares.push_back(g.shares.back() + shares);
  g.pairs.push_back(p);
}

void check(const Call& c, int code, int64_t T, int64_t T_k) {
  FASTRL_CHECK(code == kFloat32 || code == kBFloat16, "code", "0 (fp32) or 1 (bf16)", code);
  FASTRL_CHECK(T >= 0 && T_k >= 0 && c.S >= 0 && c.H >= 0, "T, T_k, S, H", "at least 0", std::min({T, T_k, c.S, c.H}));
  FASTRL_CHECK(c.K >= 1 && c.H % c.K == 0, "H", "a multiple of K=" + std::to_string(c.K), c.H);
  FASTRL_CHECK(c.E >= 1 && c.E <= kAttentionWidth, "E", "1 to " + std::to_string(kAttentionWidth), c.E);
  FASTRL_CHECK(c.threads >= 1, "threads", "at least 1", c.threads);
  if (T == 0 || c.H == 0) return;  // an empty array may have no address
  FASTRL_CHECK(c.out.at && c.q.at && c.k.at && c.v.at && c.ends && c.ends_k, "y, q, k, v, ends", "addresses", "0");
  FASTRL_CHECK(!c.backward || (c.dy.at && c.y.at && c.lse && c.dk.at && c.dv.at), "dk, dv, dy, y, lse", "addresses", "0");
  check_ends("ends", c.ends, c.S, T);
  check_ends("ends_k", c.ends_k, c.S, T_k);
  for (int64_t s = 0; s < c.S; s++) {
    const int64_t queries = c.ends[s + 1] - c.ends[s], keys = c.ends_k[s + 1] - c.ends_k[s];
    FASTRL_CHECK(queries <= keys, "ends_k", "at least " + std::to_string(queries) + " keys of sequence " + std::to_string(s), keys);
  }
}

void run(const Call& c, int code, int64_t T, int64_t T_k) {
  check(c, code, T, T_k);
  if (T == 0 || c.H == 0) return;
  static thread_local Group g;
  g.pairs.clear();
  for (int64_t s = 0; s < c.S; s++) {
    const int64_t queries = c.ends[s + 1] - c.ends[s], keys = c.ends_k[s + 1] - c.ends_k[s];
    for (int64_t head = 0; queries > 0 && head < c.K; head++) {
      add(c, g, {c.ends[s], queries, c.ends_k[s], keys, head, 0, 0, 0, 0});
      if (g.copied + g.summed >= kTogether * c.threads) run(c, g);
    }
  }
  run(c, g);
}

AttentionView view(Address at, int64_t token, int64_t head) { return {reinterpret_cast<void*>(at), token, head}; }

}  // namespace

void attention_forward_cpu(Address y, Address lse, Address q, int64_t q_token, int64_t q_head, Address k, int64_t k_token, int64_t k_head,
                           Address v, int64_t v_token, int64_t v_head, int code, Address ends, Address ends_k, double scale, int64_t S,
                           int64_t T, int64_t T_k, int64_t H, int64_t K, int64_t E, int threads) {
  const AttentionRows& rows = FASTRL_CHOOSE(kAttention)[code == kBFloat16];
  Call c{rows, view(q, q_token, q_head), view(k, k_token, k_head), view(v, v_token, v_head), {}, {}, view(y, H * E, E), {}, {},
         reinterpret_cast<float*>(lse), reinterpret_cast<const int64_t*>(ends), reinterpret_cast<const int64_t*>(ends_k), S, H, K, E,
         static_cast<float>(scale), threads, false};
  run(c, code, T, T_k);
}

void attention_backward_cpu(Address dq, Address dk, Address dv, Address dy, int64_t dy_token, int64_t dy_head, Address q, int64_t q_token,
                            int64_t q_head, Address k, int64_t k_token, int64_t k_head, Address v, int64_t v_token, int64_t v_head,
                            Address y, Address lse, int code, Address ends, double scale, int64_t S, int64_t T, int64_t H, int64_t K,
                            int64_t E, int threads) {
  const AttentionRows& rows = FASTRL_CHOOSE(kAttention)[code == kBFloat16];
  const int64_t* at = reinterpret_cast<const int64_t*>(ends);
  Call c{rows, view(q, q_token, q_head), view(k, k_token, k_head), view(v, v_token, v_head), view(dy, dy_token, dy_head),
         view(y, H * E, E), view(dq, H * E, E), view(dk, K * E, E), view(dv, K * E, E), reinterpret_cast<float*>(lse), at, at, S, H, K, E,
         static_cast<float>(scale), threads, true};
  run(c, code, T, T);
}

}  // namespace fastrl
