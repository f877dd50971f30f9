// A step of paged attention: what is to be written, which rows and chunks there are, and how the cores share them.
//
// Decode is bound by memory, so K and V are read once, for all query heads of a KV head together, and what comes next is
// fetched while this is computed; contexts are split into their stretches so that every core has work. Chunks are bound by
// arithmetic: a tile of about 96 queries meets one stretch of 256 keys after the other.

#include <algorithm>
#include <cstring>
#include <vector>

#include "attention.h"

namespace jaxserve::attention {
namespace {

constexpr int TILE_ROWS = 96;             // queries of a tile, about
constexpr int64_t kWorthAHelper = 32768;  // multiply-adds below which waking another thread costs more than it saves

Kernels best_kernels() {
#if JAXSERVE_X86
  if (isa() >= Isa::kBf16) return bf16_kernels();
  if (isa() >= Isa::kAvx512) return avx512_kernels();
  if (isa() >= Isa::kAvx2) return avx2_kernels();
#endif
  return generic_kernels();
}

// Tokens that a pass over several is ahead with fetching: heads of a token lie together, those of the next do not.
constexpr int kAhead = 4;

// Fetches n floats.
void fetch(const float* x, int n) {
  for (int i = 0; i < n; i += 16) __builtin_prefetch(x + i);
}

// A key of weight exp(sink) and no value, with which a head's softmax begins, in bits; NOTHING where there is none.
float sink_of(const Step& step, int head, int member) {
  return step.sinks == nullptr ? NOTHING : step.sinks[head * step.group + member] * kBitsANat;
}

// Floats of a tile's own memory.
int64_t tile_floats(const Pool& pool, int64_t rows) {
  constexpr int64_t kSlack = 64;  // behind the queries, which are written by whole vectors
  return ceil_div(rows * (pool.hv + pool.h + LANES + 4) + kSlack, LANES) * LANES;
}

// Fills a tile with `tokens` tokens' queries of one KV head, the first at `position`, each `apart` behind the one before. Its memory is
// the thread's `place`-th of `places`.
Tile start_tile(const Step& step, const Pool& pool, const Kernels& use, int64_t token, int tokens, int head,
                int position, int apart, int place, int places) {
  Tile tile;
  const int64_t rows = tile.rows = tokens * step.group, floats = tile_floats(pool, rows);
  const bool own_weights = pool.kind == Kind::kInt8 || (use.bf16_dot && pool.kind == Kind::kBfloat16);
  constexpr int64_t kShared = 2 * ROWS_AT_ONCE * STRETCH;
  tile.score = static_cast<float*>(scratch(kTile, sizeof(float) * (kShared + floats * places)));
  tile.weight = own_weights ? tile.score + ROWS_AT_ONCE * STRETCH : tile.score;  // float32 weights replace their scores
  tile.sum = tile.score + kShared + floats * place;
  tile.total = tile.sum + rows * pool.hv;
  tile.best = tile.total + rows * LANES;
  tile.q_unit = tile.best + rows;
  tile.position = reinterpret_cast<int*>(tile.q_unit + rows);
  tile.less = tile.position + rows;
  tile.q = tile.less + rows;
  for (int j = 0; j < tokens; ++j) {
    if (j + kAhead < tokens)
      fetch(step.q + (token + j + kAhead) * step.q_token + head * step.q_head, step.group * pool.h);
    use.queries(step, pool, token + j, head, tile, j * step.group);
    for (int g = 0; g < step.group; ++g) tile.position[j * step.group + g] = position + j * apart;
  }
  return tile;
}

// Makes a tile's softmax one of no keys, but sinks where it has them.
void begin_tile(const Step& step, const Pool& pool, const Tile& tile, int head, bool with_sinks) {
  std::memset(tile.sum, 0, sizeof(float) * tile.rows * pool.hv);
  std::memset(tile.total, 0, sizeof(float) * tile.rows * LANES);
  for (int row = 0; row < tile.rows; ++row) {
    tile.best[row] = with_sinks ? sink_of(step, head, row % step.group) : NOTHING;
    tile.total[row * LANES] = tile.best[row] == NOTHING ? 0.0f : 1.0f;
  }
}

// Joins `count` stretches' softmaxes of a row, `apart` floats from one to the next, in order, to one that begins with a sink.
void merge(const Kernels& use, const Pool& pool, const float* parts, int64_t count, int64_t apart, float sink,
           float* out) {
  const int hv = pool.hv;
  float* const row = static_cast<float*>(scratch(kRow, sizeof(float) * (PART + hv)));
  std::memset(row, 0, sizeof(float) * (PART + hv));
  row[0] = sink == NOTHING ? 0.0f : 1.0f;
  row[LANES] = sink;
  for (int64_t n = 0; n < count; ++n) use.join(row, parts + n * apart, hv);
  use.finish(pool, row + PART, row, out);
}

struct DecodePiece {
  Piece keys;
  int32_t row, qlen;
  int64_t partial;  // where its rows' parts go when the context has several stretches; -1 when it is whole
  bool last;        // holds the row's newest token
};

struct Joined {  // a row's stretches of one head, whose parts lie one behind the other and are to be joined
  int32_t row, head, qlen;
  int64_t partial, count;
};

struct ChunkItem {
  int32_t row, head, first, tokens;
};

}  // namespace

ffi::Error run_step(ffi::ThreadPool& threads, const Step& step, const Pool& pool, const Rows& decode, const Rows& chunk,
                    int64_t num_tokens) {
  const Kernels use = best_kernels();
  const int G = step.group, K = pool.heads, hv = pool.hv;
  const int64_t token_floats = static_cast<int64_t>(K) * G * hv;
  const int64_t limit = decode.count == 0 && chunk.count == 0 ? 0 : pool.page_size;
  const int64_t cores = std::max<int64_t>(threads.num_threads(), 1);

  // Decode: one item a row, stretch of keys and KV head, in this order: heads of a page are neighbours, and memory gives more to who
  // reads neighbours soon after each other. Where a row has several tokens, its items have the queries of them all.
  const int64_t Q = decode.count == 0 ? 1 : decode.places, first_chunk = decode.count * Q, C = num_tokens - first_chunk;
  auto qlen_of = [&](int64_t b) -> int64_t { return decode.qlen == nullptr ? decode.len[b] > 0 : decode.qlen[b]; };
  auto begin_of = [&](int64_t b) {
    return std::max<int64_t>(0, decode.len[b] - std::max<int64_t>(qlen_of(b), 1) + 1 - pool.window) / PANEL * PANEL;
  };
  const bool write = step.k != nullptr;
  std::vector<int64_t> writes;
  int64_t context = 0, pairs = 0;
  for (int64_t b = 0; b < decode.count; ++b) {
    const int64_t len = decode.len[b], qlen = qlen_of(b);
    if (len < 0 || len > decode.width * limit)
      return ffi::Error::InvalidArgument("a context longer than its page table");
    if (qlen < 0 || qlen > Q || qlen > len) return ffi::Error::InvalidArgument("a decode row of too many tokens");
    if (qlen == 0) continue;
    context += len - begin_of(b);
    pairs += (len - begin_of(b)) * qlen;
    for (int64_t j = 0; write && Q > 1 && j < qlen; ++j) writes.push_back(b * Q + j);
  }
  const int64_t share = context * K / (cores * 4);
  std::vector<DecodePiece> pieces;
  std::vector<Joined> joined;
  std::vector<int32_t> groups{0};  // a thread takes pieces [groups[i], groups[i + 1]) together
  int64_t partials = 0, grouped = 0;
  for (int64_t b = 0; b < decode.count; ++b) {
    const int64_t len = decode.len[b], from = begin_of(b), qlen = qlen_of(b);
    std::memset(step.out + (b * Q + qlen) * token_floats, 0, sizeof(float) * token_floats * (Q - qlen));
    if (qlen == 0) continue;
    const int64_t stretches = ceil_div(len, STRETCH) - from / STRETCH, apart = qlen * G * (PART + hv);
    for (int64_t begin = from, end, n = 0; begin < len; begin = end, ++n) {
      end = std::min<int64_t>((begin / STRETCH + 1) * STRETCH, len);
      for (int head = 0; head < K; ++head) {
        const Piece keys{decode.pages + b * decode.width, head, static_cast<int>(begin), static_cast<int>(end)};
        pieces.push_back({keys, static_cast<int32_t>(b), static_cast<int32_t>(qlen),
                          stretches == 1 ? -1 : partials + (head * stretches + n) * apart, end == len});
        grouped += end - begin;
        if (grouped >= share / 2) {
          groups.push_back(static_cast<int32_t>(pieces.size()));
          grouped = 0;
        }
      }
    }
    for (int head = 0; stretches > 1 && head < K; ++head, partials += stretches * apart)
      joined.push_back({static_cast<int32_t>(b), head, static_cast<int32_t>(qlen), partials, stretches});
  }
  if (groups.back() < static_cast<int32_t>(pieces.size())) groups.push_back(static_cast<int32_t>(pieces.size()));
  float* const parts = static_cast<float*>(scratch(kPartial, sizeof(float) * partials));

  // Chunks: tiles of queries, the longest contexts first.
  int tile_tokens = std::max(1, TILE_ROWS / G);
  while (tile_tokens > 1 && tile_tokens * G > 24 && C / tile_tokens * K < 4 * cores) tile_tokens /= 2;
  std::vector<ChunkItem> chunk_items;
  std::vector<char> real(C, 0);
  for (int64_t r = 0; r < chunk.count; ++r) {
    const int64_t qlen = chunk.qlen[r], len = chunk.len[r], start = chunk.start[r];
    if (qlen == 0) continue;
    if (qlen < 0 || qlen > len || len > chunk.width * limit || start < 0 || start + qlen > C)
      return ffi::Error::InvalidArgument("a chunk outside its step or its page table");
    std::fill_n(real.begin() + start, qlen, 1);
    pairs += qlen * std::min<int64_t>(len, pool.window);
    for (int head = 0; head < K; ++head)
      for (int64_t first = (qlen - 1) / tile_tokens * tile_tokens; first >= 0; first -= tile_tokens)
        chunk_items.push_back({static_cast<int32_t>(r), head, static_cast<int32_t>(first),
                               static_cast<int32_t>(std::min<int64_t>(tile_tokens, qlen - first))});
  }
  for (int64_t i = 0; i < C; ++i) {
    if (!real[i]) std::memset(step.out + (first_chunk + i) * token_floats, 0, sizeof(float) * token_floats);
    if (write && step.index[first_chunk + i] > 0) writes.push_back(first_chunk + i);  // some are kept and attend to nothing
  }

  // Every token must be in its page before a tile reads it. A decode row's single one is written by whoever reads it.
  constexpr int64_t kWritesAnItem = 64;
  const int64_t write_items = ceil_div(writes.size(), kWritesAnItem);
  const auto write_tokens = [&](int64_t item, int) {
    const size_t end = std::min(writes.size(), static_cast<size_t>(item + 1) * kWritesAnItem);
    for (size_t i = item * kWritesAnItem, n; i < end; i += n) {
      for (n = 1; i + n < end && n < kAhead && writes[i + n] == writes[i] + static_cast<int64_t>(n);) ++n;
      int wrote = 0;
      for (int head = 0; head < K; ++head) {
        for (size_t j = 0; j < n; ++j) {
          fetch(step.k + (writes[i] + j + kAhead) * step.k_token + head * step.k_head, pool.h);
          fetch(step.v + (writes[i] + j + kAhead) * step.v_token + head * step.v_head, hv);
        }
        wrote = use.write(step, pool, writes[i], static_cast<int>(n), head);
      }
      n = wrote;
    }
  };

  const auto attend_chunk = [&](const ChunkItem& item) {
    const int64_t token = first_chunk + chunk.start[item.row] + item.first;
    const int len = chunk.len[item.row];
    const int position = step.whole ? len - 1 : len - chunk.qlen[item.row] + item.first, apart = step.whole ? 0 : 1;
    const Tile tile = start_tile(step, pool, use, token, item.tokens, item.head, position, apart, 0, 1);
    begin_tile(step, pool, tile, item.head, true);
    float* const out = step.out + token * token_floats + item.head * G * hv;
    for (int j = 0; j < item.tokens; ++j)  // a store that misses the cache waits, and there is time until then
      for (int i = 0; i < G * hv; i += 16) __builtin_prefetch(out + j * token_floats + i, 1, 2);
    const Piece keys{chunk.pages + item.row * chunk.width, item.head, std::max(0, position - pool.window + 1),
                     step.whole ? len : position + item.tokens};
    use.attend(tile, pool, keys, nullptr, Ask::kNothing);
    for (int row = 0; row < tile.rows; ++row)
      use.finish(pool, tile.sum + row * hv, tile.total + row * LANES, out + row / G * token_floats + row % G * hv);
  };
  const auto out_of = [&](int64_t token, int head, int row) {  // row r of a tile is head r % G of token r / G
    return step.out + (token + row / G) * token_floats + (static_cast<int64_t>(head) * G + row % G) * hv;
  };
  // `tiles`: those of the row's heads that the thread has queries for, or of no rows.
  const auto attend_decode = [&](const DecodePiece& piece, std::vector<Tile>& tiles, const Piece* next, Ask asks) {
    const int head = piece.keys.head;
    const int64_t token = piece.row * Q;
    if (write && Q == 1 && piece.last) use.write(step, pool, token, 1, head);
    const int position = decode.len[piece.row] - piece.qlen;
    Tile& tile = tiles[head];
    if (tile.rows == 0) tile = start_tile(step, pool, use, token, piece.qlen, head, position, 1, head, K);
    begin_tile(step, pool, tile, head, piece.partial < 0);
    use.attend(tile, pool, piece.keys, next, asks);
    for (int row = 0; row < tile.rows; ++row) {
      if (piece.partial < 0) {
        use.finish(pool, tile.sum + row * hv, tile.total + row * LANES, out_of(token, head, row));
      } else {
        float* to = parts + piece.partial + row * (PART + hv);
        std::memcpy(to, tile.total + row * LANES, sizeof(float) * LANES);
        to[LANES] = tile.best[row];
        std::memcpy(to + PART, tile.sum + row * hv, sizeof(float) * hv);
      }
    }
  };
  const int64_t chunks = chunk_items.size(), decodes = groups.size() - 1;
  const int64_t products = pairs * K * G * (pool.h + hv);
  const auto attend = [&](int64_t i, int) {
    if (i < chunks) return attend_chunk(chunk_items[i]);
    const int32_t first = groups[i - chunks], end = groups[i - chunks + 1];
    std::vector<Tile> tiles(K);
    for (int32_t n = first; n < end; ++n) {
      if (n > first && pieces[n].row != pieces[n - 1].row) tiles.assign(K, Tile{});
      attend_decode(pieces[n], tiles, n + 1 < end ? &pieces[n + 1].keys : nullptr, n == first ? Ask::kAll : Ask::kNext);
    }
  };
  const auto join_pieces = [&](int64_t i, int) {
    const Joined& one = joined[i];
    const int rows = one.qlen * G;
    for (int row = 0; row < rows; ++row)
      merge(use, pool, parts + one.partial + row * (PART + hv), one.count, rows * (PART + hv),
            sink_of(step, one.head, row % G), out_of(one.row * Q, one.head, row));
  };
  if (products < kWorthAHelper) {
    for (int64_t i = 0; i < write_items; ++i) write_tokens(i, 0);
    for (int64_t i = 0; i < chunks + decodes; ++i) attend(i, 0);
    for (size_t i = 0; i < joined.size(); ++i) join_pieces(i, 0);
  } else {
    Phases phases;
    // Products give each thread rows of its own, in order: what it has computed lies in its core's cache.
    const int workers = static_cast<int>(cores);
    phases.add_apart(write_items, workers, write_tokens);
    phases.add_apart(chunks + decodes, workers, attend);
    phases.add_apart(joined.size(), workers, join_pieces);
    phases.run(threads);
  }
  return ffi::Error::Success();
}

}  // namespace jaxserve::attention
