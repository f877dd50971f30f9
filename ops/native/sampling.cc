// From logits to tokens on the CPU, a row at a time: edits, filters, draw, log-probabilities.
//
// XLA's own way goes over all rows in as many passes as the most demanding one needs, and copies [R, V] at every choice
// between two ways. Here each row takes only the passes that it needs itself.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "common.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross from one instruction set to another
#endif

namespace jaxserve {
namespace {

constexpr int BLOCK = 64;                      // logits a block; as ops/sampling/threshold.py
constexpr float NEGLIGIBLE = 104.0f;           // below e^-104 there is no weight; likewise
constexpr float kGreedyTemperature = 1e-5f;    // as ops/sampling/draw.py
constexpr int32_t PROMPT_BIT = 1 << 14;        // as ops/sampling/edits.py
constexpr int64_t kSortedCandidates = 48;      // below so many, sorting beats another pass

// Slots of a thread's scratch memory.
enum { kPeaks, kSums, kCandidates, kCopy, kEdited };

struct Row {
  const float* x;
  int64_t vocab, blocks;
  float tail[BLOCK];  // the last block where it is not whole, filled up with -inf

  Row(const float* x_, int64_t vocab_) : x(x_), vocab(vocab_), blocks(ceil_div(vocab_, BLOCK)) {
    const int64_t whole = vocab / BLOCK * BLOCK;
    if (whole == vocab) return;
    std::fill(tail, tail + BLOCK, -INFINITY);
    std::copy(x + whole, x + vocab, tail);
  }
};

struct Scale {  // z = (logit - peak) * inverse
  float peak, inverse;
};

struct Filters {
  float temperature, top_p, min_p;
  int32_t top_k;
  const float* uniform;  // two numbers in [0, 1): which block, and which token in it

  bool any(int64_t vocab) const { return (top_k > 0 && top_k < vocab) || top_p < 1 || min_p > 0; }
};

struct RowEdits {
  const int16_t* seen;  // null: no penalties
  float repetition, presence, frequency;
  const int32_t* bias_ids;
  const float* bias_values;
  int64_t num_bias;
  const int32_t* banned_ids;
  int64_t num_banned;
  const uint32_t* mask;  // null: everything is allowed

  bool any() const { return seen != nullptr || num_bias > 0 || num_banned > 0 || mask != nullptr; }
};

#define ISA generic
#define AT
#define W 4
#include "sampling_kernels.h"
#undef ISA
#undef AT
#undef W

#if JAXSERVE_X86
#define ISA avx2
#define AT TARGET_AVX2
#define W 8
#include "sampling_kernels.h"
#undef ISA
#undef AT
#undef W

#define ISA avx512
#define AT TARGET_AVX512
#define W 16
#include "sampling_kernels.h"
#undef ISA
#undef AT
#undef W
#endif

struct Kernels {
  int32_t (*sample_row)(const Row&, const Filters&);
  void (*edit_row)(const float*, int64_t, const RowEdits&, float*);
  void (*logprob_row)(const Row&, int32_t, int, float*, int32_t*, int32_t*, float*);
};

Kernels kernels() {
#if JAXSERVE_X86
  if (isa() >= Isa::kAvx512) return {avx512::sample_row, avx512::edit_row, avx512::logprob_row};
  if (isa() >= Isa::kAvx2) return {avx2::sample_row, avx2::edit_row, avx2::logprob_row};
#endif
  return {generic::sample_row, generic::edit_row, generic::logprob_row};
}

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using S16 = ffi::Buffer<ffi::S16>;

// Facts of a row: params [R, 6] float32 are temperature, top_p, min_p, repetition, presence and frequency;
// choices [R, 5] int32 are top_k, the slot, and whether the row has a bias, is held back from ending, and has a mask.
constexpr int64_t kParams = 6, kChoices = 5;

ffi::Error sample(ffi::ThreadPool pool, F32 logits, F32 params, S32 choices, F32 uniform, S16 seen, S32 bias_ids,
                  F32 bias_values, S32 banned_ids, S32 mask, ffi::ResultBuffer<ffi::S32> tokens) {
  const auto dims = logits.dimensions();
  const int64_t rows = dims[0], vocab = dims[1], slots = seen.dimensions()[0];
  const int64_t words = mask.dimensions()[1];
  if (params.dimensions()[1] != kParams || choices.dimensions()[1] != kChoices || seen.dimensions()[1] != vocab ||
      bias_ids.dimensions()[0] != slots || bias_values.element_count() != bias_ids.element_count() ||
      banned_ids.dimensions()[0] != slots || (words > 0 && words * 32 < vocab)) {
    return ffi::Error::InvalidArgument("sampling operands do not fit each other");
  }
  const Kernels use = kernels();
  const int64_t num_bias = bias_ids.dimensions()[1], num_banned = banned_ids.dimensions()[1];
  parallel_for(pool, rows, [&](int64_t r, int) {
    const float* p = params.typed_data() + r * kParams;
    const int32_t* c = choices.typed_data() + r * kChoices;
    const Filters filters{p[0], p[1], p[2], c[0], uniform.typed_data() + r * 2};
    const int64_t slot = std::min<int64_t>(std::max(c[1], 0), slots - 1);
    RowEdits edits{};
    if (p[3] != 1 || p[4] != 0 || p[5] != 0) {
      edits.seen = seen.typed_data() + slot * vocab;
      edits.repetition = p[3];
      edits.presence = p[4];
      edits.frequency = p[5];
    }
    edits.bias_ids = bias_ids.typed_data() + slot * num_bias;
    edits.bias_values = bias_values.typed_data() + slot * num_bias;
    edits.num_bias = c[2] != 0 ? num_bias : 0;
    edits.banned_ids = banned_ids.typed_data() + slot * num_banned;
    edits.num_banned = c[3] != 0 ? num_banned : 0;
    if (c[4] != 0 && words > 0) edits.mask = reinterpret_cast<const uint32_t*>(mask.typed_data()) + r * words;
    const float* x = logits.typed_data() + r * vocab;
    if (edits.any()) {
      float* edited = static_cast<float*>(scratch(kEdited, sizeof(float) * vocab));
      use.edit_row(x, vocab, edits, edited);
      x = edited;
    }
    tokens->typed_data()[r] = use.sample_row(Row(x, vocab), filters);
  });
  return ffi::Error::Success();
}

ffi::Error logprobs(ffi::ThreadPool pool, F32 logits, S32 tokens, S32 asked, ffi::ResultBuffer<ffi::F32> chosen,
                    ffi::ResultBuffer<ffi::S32> rank, ffi::ResultBuffer<ffi::S32> top_ids,
                    ffi::ResultBuffer<ffi::F32> top_values) {
  const auto dims = logits.dimensions();
  const int64_t rows = dims[0], vocab = dims[1], num_top = top_ids->dimensions()[1];
  const Kernels use = kernels();
  std::vector<int64_t> wanted;
  for (int64_t r = 0; r < rows; ++r) {
    if (asked.typed_data()[r] != 0) {
      wanted.push_back(r);
      continue;
    }
    chosen->typed_data()[r] = 0;
    rank->typed_data()[r] = 0;
    std::fill_n(top_ids->typed_data() + r * num_top, num_top, 0);
    std::fill_n(top_values->typed_data() + r * num_top, num_top, 0.0f);
  }
  parallel_for(pool, wanted.size(), [&](int64_t i, int) {
    const int64_t r = wanted[i];
    const int32_t token = std::min<int64_t>(std::max(tokens.typed_data()[r], 0), vocab - 1);
    use.logprob_row(Row(logits.typed_data() + r * vocab, vocab), token, static_cast<int>(num_top),
                    chosen->typed_data() + r, rank->typed_data() + r, top_ids->typed_data() + r * num_top,
                    top_values->typed_data() + r * num_top);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

JAXSERVE_HANDLER(jaxserve_sample, jaxserve::sample,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<jaxserve::F32>()   // logits [R, V]
                     .Arg<jaxserve::F32>()   // params [R, 6]
                     .Arg<jaxserve::S32>()   // choices [R, 5]
                     .Arg<jaxserve::F32>()   // uniform [R, 2]
                     .Arg<jaxserve::S16>()   // seen [slots, V]
                     .Arg<jaxserve::S32>()   // bias ids [slots, N]
                     .Arg<jaxserve::F32>()   // bias values [slots, N]
                     .Arg<jaxserve::S32>()   // banned ids [slots, M]
                     .Arg<jaxserve::S32>()   // mask [R, words], or [R, 0]
                     .Ret<jaxserve::S32>());  // tokens [R]

JAXSERVE_HANDLER(jaxserve_logprobs, jaxserve::logprobs,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<jaxserve::F32>()   // logits [R, V]
                     .Arg<jaxserve::S32>()   // tokens [R]
                     .Arg<jaxserve::S32>()   // asked [R]
                     .Ret<jaxserve::F32>()   // logprob [R]
                     .Ret<jaxserve::S32>()   // rank [R]
                     .Ret<jaxserve::S32>()   // top ids [R, N]
                     .Ret<jaxserve::F32>());  // top logprobs [R, N]
