// Paged attention on the CPU: writes a step's K and V into their pages and attends, reading pages where they lie.
//
// One handler does a layer's whole step: rotation of q and k (when cosines are given), the write, decode rows and
// chunk tokens. Decode is bound by memory, so K and V are read once, for all query heads of a KV head together, and
// the next block is prefetched while this one is computed; long contexts are split so that every core has work.
// Chunks are bound by arithmetic: a tile of about 48 queries meets blocks of 64 keys.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross from one instruction set to another
#endif

namespace jaxserve {
namespace {

constexpr int PANEL = 16;           // neighbouring tokens that lie together in K; a page holds a multiple of it
constexpr int BLOCK = 64;           // keys that are folded into the softmax at once
constexpr int TILE_ROWS = 48;       // queries of a tile, about
constexpr float NOTHING = -1e30f;   // running maximum before any key; finite, so that differences are not NaN
constexpr int64_t kSplitTokens = 1024;     // longest stretch of keys that one decode item reads
constexpr int64_t kWorthAHelper = 32768;   // multiply-adds below which waking another thread costs more than it saves

enum class Kind { kFloat32, kBfloat16, kInt8 };

struct Pool {  // the pages of a layer
  void *k, *v;
  float *k_scale, *v_scale;
  Kind kind;
  int64_t pages;
  int heads, h, hv, page_size;
  int window;  // positions; INT32_MAX / 2 for all
  float softcap;  // 0 for none
};

struct Piece {  // a stretch of one request's keys, for one KV head
  const int32_t* table;
  int head, begin, end;
};

struct Tile {  // queries of one head of one request, and their softmax so far
  int rows;
  void* q;        // [rows, h], scaled; pairs of bfloat16 where the instruction set multiplies those
  int* position;  // [rows]
  float *best, *total, *shrink;  // [rows]
  float *q_unit, *unit;          // [rows] what 1 in q, and in a weight, stands for
  float* score;   // [rows, BLOCK]
  void* weight;   // [rows, BLOCK] likewise
  float* sum;     // [rows, hv]
};

#define ISA generic
#define AT
#define W 4
#define ROWS 4
#define COLS 2
#define BF16_DOT 0
#include "attention_kernels.h"
#undef ISA
#undef AT
#undef W
#undef ROWS
#undef COLS
#undef BF16_DOT

#if JAXSERVE_X86
#define ISA avx2
#define AT TARGET_AVX2
#define W 8
#define ROWS 6
#define COLS 2
#define BF16_DOT 0
#include "attention_kernels.h"
#undef ISA
#undef AT
#undef W
#undef ROWS
#undef COLS
#undef BF16_DOT

#define ISA avx512
#define AT TARGET_AVX512
#define W 16
#define ROWS 6
#define COLS 4
#define BF16_DOT 0
#include "attention_kernels.h"
#undef ISA
#undef AT
#undef BF16_DOT

#define ISA bf16
#define AT TARGET_BF16
#define BF16_DOT 1
#include "attention_kernels.h"
#undef ISA
#undef AT
#undef W
#undef ROWS
#undef COLS
#undef BF16_DOT
#endif

struct Kernels {
  void (*run)(const Tile&, const Pool&, const Piece&, const Piece*, bool);
  float (*pack_query)(const float*, Kind, int, float, void*, int64_t);
  bool bf16_dot;
};

Kernels kernels() {
#if JAXSERVE_X86
  if (isa() >= Isa::kBf16) return {bf16::run, bf16::pack_query, true};
  if (isa() >= Isa::kAvx512) return {avx512::run, avx512::pack_query, false};
  if (isa() >= Isa::kAvx2) return {avx2::run, avx2::pack_query, false};
#endif
  return {generic::run, generic::pack_query, false};
}

// Slots of a thread's scratch memory.
enum { kRotated, kTile, kPartial };

// A step's operands, with the strides in which q, k and v lie.
struct Step {
  const float *q, *k, *v;
  int64_t q_token, k_token, v_token;  // floats from a token to the next
  int64_t q_head, k_head, v_head;     // floats from a KV head to the next
  const float *cos, *sin;             // [T, half], or null
  int half;
  const float* sinks;  // [K, G], or null
  const int32_t* index;
  int group;
  float scale;
  float* out;  // [T, K, G, hv]
};

void rotate(const float* x, const float* cos, const float* sin, int half, int h, float* y) {
  for (int i = 0; i < half; ++i) {
    y[i] = x[i] * cos[i] - x[half + i] * sin[i];
    y[half + i] = x[half + i] * cos[i] + x[i] * sin[i];
  }
  for (int i = 2 * half; i < h; ++i) y[i] = x[i];
}

// Symmetric int8; element i goes to `to + i / pair * apart + i % pair`. Returns the scale.
float quantize(const float* x, int n, int pair, int64_t apart, int8_t* to) {
  float largest = 0;
  for (int i = 0; i < n; ++i) largest = std::max(largest, std::fabs(x[i]));
  const float scale = largest * (1.0f / 127.0f), divisor = scale == 0.0f ? 1.0f : scale;
  for (int i = 0; i < n; ++i) to[i / pair * apart + i % pair] = static_cast<int8_t>(std::nearbyint(x[i] / divisor));
  return scale;
}

// Writes one token's K and V of one head into its page.
void write(const Step& step, const Pool& pool, int64_t token, int head) {
  const int64_t index = step.index[token];
  const int64_t page = index / pool.page_size;
  const int slot = static_cast<int>(index % pool.page_size), size = pool.page_size, h = pool.h, hv = pool.hv;
  if (index < 0 || page >= pool.pages) return;
  const float* k = step.k + token * step.k_token + head * step.k_head;
  const float* v = step.v + token * step.v_token + head * step.v_head;
  if (step.cos != nullptr) {
    float* rotated = static_cast<float*>(scratch(kRotated, sizeof(float) * h));
    rotate(k, step.cos + token * step.half, step.sin + token * step.half, step.half, h, rotated);
    k = rotated;
  }
  const int64_t at = page * pool.heads + head;
  if (pool.kind == Kind::kBfloat16) {
    uint16_t* k_page = static_cast<uint16_t*>(pool.k) + at * h * size + 2 * slot;
    uint16_t* v_page = static_cast<uint16_t*>(pool.v) + at * size * hv + (slot / 2) * 2 * hv + slot % 2;
    for (int i = 0; i < h; ++i) k_page[(i / 2) * 2 * size + i % 2] = generic::round_bf16(k[i]);
    for (int i = 0; i < hv; ++i) v_page[2 * i] = generic::round_bf16(v[i]);
  } else if (pool.kind == Kind::kFloat32) {
    float* k_page = static_cast<float*>(pool.k) + at * h * size + slot;
    for (int i = 0; i < h; ++i) k_page[i * size] = k[i];
    std::memcpy(static_cast<float*>(pool.v) + (at * size + slot) * hv, v, sizeof(float) * hv);
  } else {
    int8_t* k_page = static_cast<int8_t*>(pool.k) + at * h * size + 2 * slot;
    int8_t* v_page = static_cast<int8_t*>(pool.v) + at * size * hv + (slot / 2) * 2 * hv + slot % 2;
    pool.k_scale[at * size + slot] = quantize(k, h, 2, 2 * size, k_page);
    pool.v_scale[at * size + slot] = quantize(v, hv, 1, 2, v_page);
  }
}

// Fills a tile with `tokens` tokens' queries of one KV head, the first at `position`.
Tile start_tile(const Step& step, const Pool& pool, const Kernels& kernels, int64_t token, int tokens, int head,
                int position, bool dot, bool with_sinks) {
  Tile tile;
  const int64_t rows = tile.rows = tokens * step.group;
  tile.score = static_cast<float*>(scratch(kTile, sizeof(float) * rows * (pool.h + pool.hv + 2 * BLOCK + 6)));
  tile.weight = dot ? tile.score + rows * BLOCK : tile.score;  // float32 weights replace their scores
  tile.sum = tile.score + 2 * rows * BLOCK;
  tile.q = tile.sum + rows * pool.hv;
  tile.best = tile.sum + rows * (pool.hv + pool.h);
  tile.total = tile.best + rows;
  tile.shrink = tile.total + rows;
  tile.q_unit = tile.shrink + rows;
  tile.unit = tile.q_unit + rows;
  tile.position = reinterpret_cast<int*>(tile.unit + rows);
  float* rotated = static_cast<float*>(scratch(kRotated, sizeof(float) * pool.h));
  for (int j = 0; j < tokens; ++j) {
    for (int g = 0; g < step.group; ++g) {
      const int row = j * step.group + g;
      const float* q = step.q + (token + j) * step.q_token + head * step.q_head + static_cast<int64_t>(g) * pool.h;
      if (step.cos != nullptr) {
        const int64_t at = (token + j) * step.half;
        rotate(q, step.cos + at, step.sin + at, step.half, pool.h, rotated);
        q = rotated;
      }
      tile.q_unit[row] = kernels.pack_query(q, pool.kind, pool.h, step.scale, tile.q, row);
      tile.position[row] = position + j;
      const bool sink = with_sinks && step.sinks != nullptr;  // a key of weight exp(sink) and no value
      tile.best[row] = sink ? step.sinks[head * step.group + g] : NOTHING;
      tile.total[row] = sink ? 1.0f : 0.0f;
    }
  }
  std::memset(tile.sum, 0, sizeof(float) * tile.rows * pool.hv);
  return tile;
}

void finish(const float* sum, float total, int hv, float* out) {
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  for (int i = 0; i < hv; ++i) out[i] = sum[i] * inverse;
}

// Joins `count` partial softmaxes, `apart` floats from one to the next, each its maximum, total and sums.
void merge(float* parts, int64_t count, int64_t apart, int hv, float* out) {
  float best = parts[0];
  for (int64_t n = 1; n < count; ++n) best = std::max(best, parts[n * apart]);
  float total = 0;
  for (int64_t n = 0; n < count; ++n) {
    const float* part = parts + n * apart;
    const float weight = std::exp(part[0] - best);
    total += part[1] * weight;
    for (int c = 0; c < hv; ++c) parts[2 + c] = (n == 0 ? 0.0f : parts[2 + c]) + part[2 + c] * weight;
  }
  finish(parts + 2, total, hv, out);
}

struct Rows {  // the rows of one part of a batch
  const int32_t *pages, *start, *qlen, *len;
  int64_t count, width;
};

struct DecodePiece {
  Piece keys;
  int32_t row;
  int64_t partial;  // where its sums go when the row's context is split; -1 when it is whole
  bool last;        // holds the row's newest token
};

struct ChunkItem {
  int32_t row, head, first, tokens;
};

ffi::Error run_step(ffi::ThreadPool& threads, const Step& step, const Pool& pool, const Rows& decode, const Rows& chunk,
                    int64_t num_tokens) {
  const Kernels use = kernels();
  const bool dot = pool.kind == Kind::kInt8 || (use.bf16_dot && pool.kind == Kind::kBfloat16);
  const int G = step.group, K = pool.heads, hv = pool.hv;
  const int64_t token_floats = static_cast<int64_t>(K) * G * hv;
  const int64_t limit = decode.count == 0 && chunk.count == 0 ? 0 : pool.page_size;
  const int64_t cores = std::max<int64_t>(threads.num_threads(), 1);

  // Decode: one item a row and KV head, more where contexts are long beside the number of items.
  int64_t context = 0;
  auto begin_of = [&](int64_t len) { return std::max<int64_t>(0, len - pool.window) / PANEL * PANEL; };
  for (int64_t b = 0; b < decode.count; ++b) {
    const int64_t len = decode.len[b];
    if (len < 0 || len > decode.width * limit) return ffi::Error::InvalidArgument("a context longer than its page table");
    context += len - begin_of(len);
  }
  const int64_t share = context * K / (cores * 4);
  const int64_t stretch = std::min(std::max<int64_t>(share / BLOCK * BLOCK, BLOCK), kSplitTokens);
  std::vector<DecodePiece> pieces;
  std::vector<int32_t> groups{0};  // a thread takes pieces [groups[i], groups[i + 1]) together
  int64_t partials = 0, grouped = 0;
  for (int64_t b = 0; b < decode.count; ++b) {
    const int64_t len = decode.len[b], from = begin_of(len);
    if (len == 0) {
      std::memset(step.out + b * token_floats, 0, sizeof(float) * token_floats);
      continue;
    }
    const int64_t splits = std::max<int64_t>(1, (len - from + stretch / 2) / stretch);
    const int64_t each = ceil_div(ceil_div(len - from, splits), PANEL) * PANEL;
    for (int head = 0; head < K; ++head) {
      for (int64_t begin = from; begin < len; begin += each) {
        const int64_t end = std::min(begin + each, len);
        const bool whole = begin == from && end == len;
        pieces.push_back({{decode.pages + b * decode.width, head, static_cast<int>(begin), static_cast<int>(end)},
                          static_cast<int32_t>(b),
                          whole ? -1 : partials,
                          end == len});
        partials += whole ? 0 : G * (hv + 2);
        grouped += end - begin;
        if (grouped >= share / 2) {
          groups.push_back(static_cast<int32_t>(pieces.size()));
          grouped = 0;
        }
      }
    }
  }
  if (groups.back() < static_cast<int32_t>(pieces.size())) groups.push_back(static_cast<int32_t>(pieces.size()));
  float* const parts = static_cast<float*>(scratch(kPartial, sizeof(float) * partials));

  // Chunks: tiles of queries, the longest contexts first.
  const int tile_tokens = std::max(1, TILE_ROWS / G);
  std::vector<ChunkItem> chunk_items;
  std::vector<int64_t> writes;
  std::vector<char> real(num_tokens - decode.count, 0);
  int64_t pairs = 0;
  for (int64_t r = 0; r < chunk.count; ++r) {
    const int64_t qlen = chunk.qlen[r], len = chunk.len[r], start = chunk.start[r];
    if (qlen == 0) continue;
    if (qlen < 0 || qlen > len || len > chunk.width * limit || start < 0 || decode.count + start + qlen > num_tokens)
      return ffi::Error::InvalidArgument("a chunk outside its step or its page table");
    for (int64_t j = 0; j < qlen; ++j) {
      writes.push_back(decode.count + start + j);
      real[start + j] = 1;
    }
    pairs += qlen * std::min<int64_t>(len, pool.window);
    for (int head = 0; head < K; ++head)
      for (int64_t first = (qlen - 1) / tile_tokens * tile_tokens; first >= 0; first -= tile_tokens)
        chunk_items.push_back({static_cast<int32_t>(r), head, static_cast<int32_t>(first),
                               static_cast<int32_t>(std::min<int64_t>(tile_tokens, qlen - first))});
  }
  for (size_t i = 0; i < real.size(); ++i)
    if (!real[i]) std::memset(step.out + (decode.count + i) * token_floats, 0, sizeof(float) * token_floats);

  // Every chunk token must be in its page before a tile reads it. A decode row's token is written by whoever reads it.
  constexpr int64_t kWritesAnItem = 64;
  const int64_t write_items = ceil_div(writes.size(), kWritesAnItem);
  const auto write_chunks = [&](int64_t item, int) {
    const size_t end = std::min(writes.size(), static_cast<size_t>(item + 1) * kWritesAnItem);
    for (size_t i = item * kWritesAnItem; i < end; ++i)
      for (int head = 0; head < K; ++head) write(step, pool, writes[i], head);
  };

  const auto attend_chunk = [&](const ChunkItem& item) {
    const int64_t token = decode.count + chunk.start[item.row] + item.first;
    const int position = chunk.len[item.row] - chunk.qlen[item.row] + item.first;
    const Tile tile = start_tile(step, pool, use, token, item.tokens, item.head, position, dot, true);
    const Piece keys{chunk.pages + item.row * chunk.width, item.head, std::max(0, position - pool.window + 1),
                     position + item.tokens};
    use.run(tile, pool, keys, nullptr, false);
    for (int row = 0; row < tile.rows; ++row)
      finish(tile.sum + row * hv, tile.total[row], hv,
             step.out + (token + row / G) * token_floats + (static_cast<int64_t>(item.head) * G + row % G) * hv);
  };
  const auto attend_decode = [&](const DecodePiece& piece, const Piece* next) {
    const int head = piece.keys.head;
    if (piece.last) write(step, pool, piece.row, head);
    const Tile tile = start_tile(step, pool, use, piece.row, 1, head, decode.len[piece.row] - 1, dot, piece.last);
    use.run(tile, pool, piece.keys, next, true);
    for (int g = 0; g < G; ++g) {
      if (piece.partial < 0) {
        finish(tile.sum + g * hv, tile.total[g], hv,
               step.out + piece.row * token_floats + (static_cast<int64_t>(head) * G + g) * hv);
      } else {
        float* to = parts + piece.partial + g * (hv + 2);
        to[0] = tile.best[g];
        to[1] = tile.total[g];
        std::memcpy(to + 2, tile.sum + g * hv, sizeof(float) * hv);
      }
    }
  };
  const int64_t chunks = chunk_items.size(), decodes = groups.size() - 1;
  const int64_t products = (pairs + context) * K * G * (pool.h + hv);
  const auto attend = [&](int64_t i, int) {
    if (i < chunks) return attend_chunk(chunk_items[i]);
    const int32_t end = groups[i - chunks + 1];
    for (int32_t n = groups[i - chunks]; n < end; ++n)
      attend_decode(pieces[n], n + 1 < end ? &pieces[n + 1].keys : nullptr);
  };
  if (products < kWorthAHelper) {
    for (int64_t i = 0; i < write_items; ++i) write_chunks(i, 0);
    for (int64_t i = 0; i < chunks + decodes; ++i) attend(i, 0);
  } else {
    Phases phases;
    phases.add(write_items, write_chunks);
    phases.add(chunks + decodes, attend);
    phases.run(threads);
  }

  // Rows that were split: pieces of one row and head are neighbours.
  for (size_t i = 0; i < pieces.size();) {
    const DecodePiece& piece = pieces[i];
    size_t after = i + 1;
    while (!pieces[after - 1].last) ++after;
    for (int g = 0; piece.partial >= 0 && g < G; ++g)
      merge(parts + piece.partial + g * (hv + 2), after - i, G * (hv + 2), hv,
            step.out + piece.row * token_floats + (static_cast<int64_t>(piece.keys.head) * G + g) * hv);
    i = after;
  }
  return ffi::Error::Success();
}

// Operands: q [T, K, G, h], k [T, K, h], v [T, K, hv] (or q [T, K, G + 2, h], with k and v empty: a KV head's queries,
// then its k, then its v), cos and sin [T, r / 2] (empty: already rotated), sinks [K, G] (empty: none), the batch's
// integers, then pages k and v and, for int8, their scales. Results: out [T, K, G, hv] and the pages, aliased.
ffi::Error attention(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k, ffi::Buffer<ffi::F32> v,
                     ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin, ffi::Buffer<ffi::F32> sinks,
                     ffi::Buffer<ffi::S32> index, ffi::Buffer<ffi::S32> decode_pages, ffi::Buffer<ffi::S32> decode_len,
                     ffi::Buffer<ffi::S32> chunk_pages, ffi::Buffer<ffi::S32> chunk_start,
                     ffi::Buffer<ffi::S32> chunk_qlen, ffi::Buffer<ffi::S32> chunk_len, ffi::RemainingArgs pages,
                     ffi::Result<ffi::Buffer<ffi::F32>> out, ffi::RemainingRets new_pages, float scale, float softcap,
                     int32_t window) {
  if (new_pages.size() != 2 && new_pages.size() != 4) return ffi::Error::InvalidArgument("pages are 2 or 4 arrays");
  auto k_pages = new_pages.get<ffi::AnyBuffer>(0), v_pages = new_pages.get<ffi::AnyBuffer>(1);
  if (!k_pages || !v_pages) return ffi::Error::InvalidArgument("pages are missing");
  for (size_t i = 0; i < pages.size(); ++i) {
    if (pages.get<ffi::AnyBuffer>(i)->untyped_data() != new_pages.get<ffi::AnyBuffer>(i).value()->untyped_data())
      return ffi::Error::Internal("pages are not updated in place");
  }

  const auto dims = out->dimensions();
  const int64_t T = dims[0], K = dims[1], G = dims[2], hv = dims[3];
  const int64_t h = q.dimensions()[3];
  const bool fused = q.dimensions()[2] == G + 2;
  Pool pool{};
  pool.k = (*k_pages)->untyped_data();
  pool.v = (*v_pages)->untyped_data();
  switch ((*k_pages)->element_type()) {
    case ffi::F32:
      pool.kind = Kind::kFloat32;
      break;
    case ffi::BF16:
      pool.kind = Kind::kBfloat16;
      break;
    case ffi::S8:
      pool.kind = Kind::kInt8;
      pool.k_scale = static_cast<float*>(new_pages.get<ffi::AnyBuffer>(2).value()->untyped_data());
      pool.v_scale = static_cast<float*>(new_pages.get<ffi::AnyBuffer>(3).value()->untyped_data());
      break;
    default:
      return ffi::Error::InvalidArgument("pages are float32, bfloat16 or int8");
  }
  pool.pages = (*k_pages)->dimensions()[0];
  pool.heads = static_cast<int>(K);
  pool.h = static_cast<int>(h);
  pool.hv = static_cast<int>(hv);
  pool.page_size = static_cast<int>((*k_pages)->dimensions()[3]);
  pool.window = window > 0 ? window : INT32_MAX / 2;
  pool.softcap = softcap;
  if (pool.page_size % PANEL != 0 || hv % PANEL != 0 || h % 2 != 0)
    return ffi::Error::InvalidArgument("pages hold a multiple of 16 tokens, heads of v of 16 channels");

  Step step{};
  step.q = q.typed_data();
  if (fused) {
    step.k = step.q + G * h;
    step.v = step.q + (G + 1) * h;
    step.q_head = step.k_head = step.v_head = (G + 2) * h;
  } else {
    step.k = k.typed_data();
    step.v = v.typed_data();
    step.q_head = G * h;
    step.k_head = h;
    step.v_head = hv;
  }
  step.q_token = K * step.q_head;
  step.k_token = K * step.k_head;
  step.v_token = K * step.v_head;
  if (cos.element_count() > 0) {
    step.cos = cos.typed_data();
    step.sin = sin.typed_data();
    step.half = static_cast<int>(cos.dimensions()[1]);
  }
  step.sinks = sinks.element_count() > 0 ? sinks.typed_data() : nullptr;
  step.index = index.typed_data();
  step.group = static_cast<int>(G);
  step.scale = scale;
  step.out = out->typed_data();
  const Rows decode{decode_pages.typed_data(), nullptr, nullptr, decode_len.typed_data(), decode_len.dimensions()[0],
                    decode_pages.dimensions()[1]};
  const Rows chunk{chunk_pages.typed_data(), chunk_start.typed_data(), chunk_qlen.typed_data(), chunk_len.typed_data(),
                   chunk_len.dimensions()[0], chunk_pages.dimensions()[1]};
  return run_step(threads, step, pool, decode, chunk, T);
}

}  // namespace
}  // namespace jaxserve

JAXSERVE_HANDLER(jaxserve_attention, jaxserve::attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // q
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // k
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // v
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // cos
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // sin
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // sinks
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // kv_index_T
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // decode_pages_BP
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // decode_len_B
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // chunk_pages_RP
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // chunk_start_R
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // chunk_qlen_R
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // chunk_len_R
                                  .RemainingArgs()               // pages
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // out
                                  .RemainingRets()               // pages
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int32_t>("window"));
