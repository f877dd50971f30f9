// AVX-512 with VNNI: 6 rows x 32 channels of integer and of float sums in registers, 12 dot-product instructions for 2
// loads of weights and 6 broadcasts of activations. 6 x 64 with the float sums in L1 is a quarter slower.

#include "int8.h"
#include "vector_math.h"

#if JAXSERVE_X86

namespace jaxserve::int8 {
namespace {

constexpr int kRows = 6;
constexpr int64_t kAhead = 4;  // groups of a panel's weights between a prefetch and its use, with few rows

// The panels of a block that one tile computes; with an activation the first half are gates.
template <int NP>
struct Chosen {
  int panel[NP];
};

// A panel's channels: scales, biases, and which of them there are.
struct Channels {
  __m512 scale, bias;
  __mmask16 mask;
};

TARGET_VNNI FORCE_INLINE Channels channels_of(const Block& b, int panel) {
  const __mmask16 mask = static_cast<__mmask16>((1u << b.valid[panel]) - 1);
  return {_mm512_loadu_ps(b.scale[panel]),
          b.bias[panel] == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, b.bias[panel]), mask};
}

TARGET_VNNI FORCE_INLINE __m512 scaled(const Block& b, int64_t row, int panel, const Channels& channels, const float* sums) {
  const __m512 value = _mm512_fmadd_ps(_mm512_load_ps(sums), channels.scale, channels.bias);
  if (b.change == nullptr) return value;
  return _mm512_add_ps(value, _mm512_loadu_ps(b.change + (row * kPanels + panel) * kPanel));
}

// Channel scales, bias, change, activation, residual. It reads sums from memory: passed in registers, the compiler would keep a
// copy of them on the stack up to date in the innermost loop, which halves its speed. A panel's rows follow each other: what is the same
// for all of them is asked and loaded once.
template <int NP>
TARGET_VNNI void finish(const Block& b, int64_t row, int rows, const int (&panels)[NP], const float* sums) {
  const bool gates = b.activation != Activation::kNone;
  constexpr int kHalf = NP < 2 ? 1 : NP / 2;
  const int outputs = gates ? kHalf : NP;
  for (int j = 0; j < outputs; ++j) {
    const int panel = panels[j];
    const Channels channels = channels_of(b, panel);
    const Channels ups = gates ? channels_of(b, panels[(j + kHalf) % NP]) : channels;
    const bool whole = channels.mask == 0xffff, past = b.lasting && whole;
    float* out = b.out[panel] + row * b.out_stride;
    const float* residual = b.residual[panel] == nullptr ? nullptr : b.residual[panel] + row * b.out_stride;
    const float* sum = sums + j * kPanel;
    for (int i = 0; i < rows; ++i, sum += NP * kPanel, out += b.out_stride) {
      __m512 value = scaled(b, row + i, panel, channels, sum);
      if (gates) {
        value = gate512(value, static_cast<int>(b.activation));
        value = _mm512_mul_ps(value, scaled(b, row + i, panels[(j + kHalf) % NP], ups, sum + kHalf * kPanel));
      }
      if (b.after != Activation::kNone) value = gate512(value, static_cast<int>(b.after));
      if (residual != nullptr) {
        value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(channels.mask, residual));
        residual += b.out_stride;
      }
      if (past)
        _mm512_stream_ps(out, value);
      else if (whole)
        _mm512_storeu_ps(out, value);
      else
        _mm512_mask_storeu_ps(out, channels.mask, value);
    }
  }
}

// Weights that a tile asks for while it computes, a line of each for each of its own: those of the thread's next two panels.
// Two lines a step and all of them spread over the tiles by their rows were measured: bursts cost what the fetching saves.
struct Ahead {
  const int8_t* panel[2];
};

template <int MR, int NP>
TARGET_VNNI void tile(const Block& b, int64_t row, Chosen<NP> chosen, Ahead ahead = {}) {
  const uint8_t* a = b.a.data + row * b.a.stride;
  const int64_t groups = b.a.stride / kGroup;
  const float* scale = b.a.scale + row * groups;
  const int8_t* w[NP];
  const int16_t* weight_sums[NP];
  __m512 total[MR][NP];
  UNROLL
  for (int j = 0; j < NP; ++j) {
    w[j] = b.weight[chosen.panel[j]];
    weight_sums[j] = b.sums[chosen.panel[j]];
    UNROLL
    for (int i = 0; i < MR; ++i) total[i][j] = _mm512_setzero_ps();
  }
  if (!b.lasting) {
    UNROLL
    for (int i = 0; i < MR; ++i) {
      UNROLL
      for (int j = 0; j < NP; ++j)
        if (b.out[chosen.panel[j]] != nullptr) will_write(b.out[chosen.panel[j]] + (row + i) * b.out_stride);
    }
  }
  UNROLL
  for (int j = 0; j < NP; ++j) {
    const float* const residual = b.residual[chosen.panel[j]];
    if (residual == nullptr) continue;
    UNROLL
    for (int i = 0; i < MR; ++i) __builtin_prefetch(residual + (row + i) * b.out_stride, 0, 3);
  }
  // Scales and sums are streams too, of a line now and then, which the hardware does not run ahead of.
  UNROLL
  for (int j = 0; j < NP; ++j) __builtin_prefetch(b.scale[chosen.panel[j]] + NP * kPanel, 0, 3);
  for (int64_t group = 0; group < groups; ++group) {
    UNROLL
    for (int j = 0; j < NP; ++j) __builtin_prefetch(weight_sums[j] + (group + NP * groups) * kPanel, 0, 3);
    __m512i sum[MR][NP];
    UNROLL
    for (int j = 0; j < NP; ++j) {
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight_sums[j] + group * kPanel));
      const __m512i start = _mm512_slli_epi32(_mm512_cvtepi16_epi32(packed), 7);
      UNROLL
      for (int i = 0; i < MR; ++i) sum[i][j] = _mm512_sub_epi32(_mm512_setzero_si512(), start);
    }
    const int64_t end = (group + 1) * kQuads < b.quads ? (group + 1) * kQuads : b.quads;
    // Few rows wait for memory, and the hardware alone is not far enough ahead of four streams: these panels, and behind their
    // ends those of the next block.
    const int8_t* later[NP];
    if (NP == 4) {
      const int64_t at = group + kAhead;
      UNROLL
      for (int j = 0; j < NP; ++j) {
        const int8_t* const next = b.next[j] == nullptr ? w[j] : b.next[j];
        later[j] = at < groups ? w[j] + kAhead * kGroup * kPanel : next + (at - groups - group) * kGroup * kPanel;
      }
    }
    UNROLL_4
    for (int64_t quad = group * kQuads; quad < end; ++quad) {
      __m512i weight[NP];
      UNROLL
      for (int j = 0; j < NP; ++j) {
        if (NP == 4) __builtin_prefetch(later[j] + quad * 64, 0, 2);
        weight[j] = _mm512_loadu_si512(w[j] + quad * 64);
      }
      if (NP < 4) {
        __builtin_prefetch(ahead.panel[0] + quad * 64, 0, 2);
        __builtin_prefetch(ahead.panel[1] + quad * 64, 0, 2);
      }
      UNROLL
      for (int i = 0; i < MR; ++i) {
        const __m512i activation = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(a + i * b.a.stride + quad * 4));
        UNROLL
        for (int j = 0; j < NP; ++j) sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], activation, weight[j]);
      }
    }
    UNROLL
    for (int i = 0; i < MR; ++i) {
      const __m512 row_scale = _mm512_set1_ps(scale[i * groups + group]);
      UNROLL
      for (int j = 0; j < NP; ++j) {
        total[i][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i][j]), row_scale, total[i][j]);
      }
    }
  }
  alignas(64) float sums[MR * NP * kPanel];
  UNROLL
  for (int i = 0; i < MR; ++i) {
    UNROLL
    for (int j = 0; j < NP; ++j) _mm512_store_ps(sums + (i * NP + j) * kPanel, total[i][j]);
  }
  finish<NP>(b, row, MR, chosen.panel, sums);
  if (b.lasting) _mm_sfence();
}

// One panel of one row: a single stream from memory, which the hardware runs ahead of by itself. Its integer sums wait for each other
// less as four of their own.
TARGET_VNNI FORCE_INLINE __m512 panel_of_row(const Block& b, int panel) {
  const int8_t* const w = b.weight[panel];
  const int16_t* const weight_sums = b.sums[panel];
  const int64_t groups = b.a.stride / kGroup;
  const auto product = [&](int64_t quad, __m512i sum) TARGET_VNNI {
    const __m512i activation = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(b.a.data + quad * 4));
    return _mm512_dpbusd_epi32(sum, activation, _mm512_loadu_si512(w + quad * 64));
  };
  __m512 total = _mm512_setzero_ps();
  for (int64_t group = 0; group < groups; ++group) {
    __builtin_prefetch(weight_sums + (group + kPanels * groups) * kPanel, 0, 3);
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight_sums + group * kPanel));
    const __m512i none = _mm512_setzero_si512();
    __m512i sum[4] = {_mm512_sub_epi32(none, _mm512_slli_epi32(_mm512_cvtepi16_epi32(packed), 7)), none, none, none};
    const int64_t first = group * kQuads;
    if (first + kQuads <= b.quads) {
      UNROLL
      for (int i = 0; i < kQuads; ++i) sum[i % 4] = product(first + i, sum[i % 4]);
    } else {
      for (int64_t quad = first; quad < b.quads; ++quad) sum[0] = product(quad, sum[0]);
    }
    const __m512i all = _mm512_add_epi32(_mm512_add_epi32(sum[0], sum[1]), _mm512_add_epi32(sum[2], sum[3]));
    total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), _mm512_set1_ps(b.a.scale[group]), total);
  }
  return total;
}

template <int NP>
TARGET_VNNI void one_row(const Block& b) {
  alignas(64) float sums[NP * kPanel];
  int panels[NP];
  for (int j = 0; j < NP; ++j) {
    panels[j] = j;
    if (!b.lasting) will_write(b.out[j]);
    if (b.residual[j] != nullptr) __builtin_prefetch(b.residual[j], 0, 3);
    __builtin_prefetch(b.scale[j] + NP * kPanel, 0, 3);
    _mm512_store_ps(sums + j * kPanel, panel_of_row(b, j));
  }
  finish<NP>(b, 0, 1, panels, sums);
  if (b.lasting) _mm_sfence();
}

// `next`: the two panels that follow, or null.
template <int NP>
void rows(const Block& b, Chosen<NP> chosen, const int8_t* const (&next)[2]) {
  // A tile fetches one of the two, as long as there are two tiles: what memory brings is spread over the time there is. Lines that
  // are there already cost next to nothing.
  const int8_t* const here = b.weight[chosen.panel[0]];
  const int8_t* const first = next[0] == nullptr ? here : next[0];
  const int8_t* const second = next[1] == nullptr ? here : next[1];
  const auto share = [&](int64_t row, bool alone) -> Ahead {
    if (row == 0) return {{first, alone ? second : here}};
    return {{row == kRows ? second : here, here}};
  };
  int64_t row = 0;
  for (; row + kRows <= b.rows; row += kRows) {
    tile<kRows, NP>(b, row, chosen, share(row, b.rows == kRows));
    if (b.fetch != nullptr) b.fetch->some(b.fetch->lines() * kRows / (b.rows * (b.panels / 2 + b.panels % 2)) + 1);
  }
  const Ahead ahead = share(row, true);
  switch (b.rows - row) {
    case 1: return tile<1, NP>(b, row, chosen, ahead);
    case 2: return tile<2, NP>(b, row, chosen, ahead);
    case 3: return tile<3, NP>(b, row, chosen, ahead);
    case 4: return tile<4, NP>(b, row, chosen, ahead);
    case 5: return tile<5, NP>(b, row, chosen, ahead);
    default: return;
  }
}

void block(const Block& b) {
  // Gates and ups are two streams in any case.
  if (b.rows == 1 && b.activation == Activation::kNone) {
    if (b.panels == 4) return one_row<4>(b);
    if (b.panels == 2) return one_row<2>(b);
  }
  // Few rows: four streams of weights at once hide the memory's latency.
  if (b.panels == 4 && b.rows <= 3) {
    const Chosen<4> all{{0, 1, 2, 3}};
    if (b.rows == 1) return tile<1, 4>(b, 0, all);
    if (b.rows == 2) return tile<2, 4>(b, 0, all);
    return tile<3, 4>(b, 0, all);
  }
  if (b.activation != Activation::kNone) {
    const int half = b.panels / 2;
    for (int p = 0; p < half; ++p) {
      const bool last = p + 1 == half;
      rows<2>(b, {{p, p + half}}, {last ? b.next[0] : b.weight[p + 1], last ? b.next[half] : b.weight[p + 1 + half]});
    }
    return;
  }
  for (int p = 0; p < b.panels; p += 2) {
    const bool last = p + 2 >= b.panels;
    const int8_t* const third = p + 3 < b.panels ? b.weight[p + 3] : nullptr;
    const int8_t* const next[2] = {last ? b.next[0] : b.weight[p + 2], last ? b.next[1] : third};
    if (p + 2 <= b.panels)
      rows<2>(b, {{p, p + 1}}, next);
    else
      rows<1>(b, {{p}}, next);
  }
}

// x of each lane times its sign plus that of the lane it changes places with: their sum in the lower, the difference in the upper.
TARGET_VNNI FORCE_INLINE __m512 butterfly(__m512 x, __m512 swapped, __mmask16 upper) {
  const __m512 sign = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), upper, _mm512_set1_ps(-1.0f));
  return _mm512_fmadd_ps(x, sign, swapped);
}

// The Hadamard transform of a group, without its factor.
TARGET_VNNI FORCE_INLINE void rotate(__m512 (&value)[4]) {
  UNROLL
  for (int stride = 2; stride > 0; stride /= 2) {
    UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i & stride) continue;
      const __m512 a = value[i], b = value[i + stride];
      value[i] = _mm512_add_ps(a, b);
      value[i + stride] = _mm512_sub_ps(a, b);
    }
  }
  UNROLL
  for (int i = 0; i < 4; ++i) {
    __m512 x = value[i];
    x = butterfly(x, _mm512_shuffle_f32x4(x, x, 0x4e), 0xff00);  // lanes 8 apart
    x = butterfly(x, _mm512_shuffle_f32x4(x, x, 0xb1), 0xf0f0);  // 4
    x = butterfly(x, _mm512_permute_ps(x, 0x4e), 0xcccc);        // 2
    value[i] = butterfly(x, _mm512_permute_ps(x, 0xb1), 0xaaaa);
  }
}

// Sixteen numbers of a row, zeros beyond its end.
TARGET_VNNI FORCE_INLINE __m512 numbers(const float* x, int64_t left) {
  if (left >= 16) return _mm512_loadu_ps(x);
  return _mm512_maskz_loadu_ps(left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1), x);
}

template <bool NORMED, bool ROTATED>
TARGET_VNNI void round_numbers(const Rounding& r, int64_t row) {
  const float* x = r.x + row * r.stride;
  uint8_t* data = r.data + r.at(row) * kGroup;
  float* scale = r.scale + r.at(row);
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  __m512 squares = _mm512_setzero_ps();
  for (int64_t group = 0; group < r.groups; ++group) {
    const int64_t begin = group * kGroup, left = r.width - begin;
    __m512 value[4];
    UNROLL
    for (int i = 0; i < 4; ++i) {
      value[i] = numbers(x + begin + i * 16, left - i * 16);
      if (NORMED) {
        squares = _mm512_fmadd_ps(value[i], value[i], squares);
        value[i] = _mm512_mul_ps(value[i], numbers(r.gain + begin + i * 16, left - i * 16));
      }
    }
    if (ROTATED) rotate(value);
    const __m512 peaks = _mm512_max_ps(_mm512_max_ps(_mm512_abs_ps(value[0]), _mm512_abs_ps(value[1])),
                                       _mm512_max_ps(_mm512_abs_ps(value[2]), _mm512_abs_ps(value[3])));
    const float peak = _mm512_reduce_max_ps(peaks);
    const __m512 inverse = _mm512_set1_ps(peak > 1e-30f ? 127.0f / peak : 0.0f);
    __m512i rounded[4];
    UNROLL
    for (int i = 0; i < 4; ++i) rounded[i] = _mm512_cvtps_epi32(_mm512_mul_ps(value[i], inverse));
    // Packed in pairs of quarters, which leaves fours in an order that one permutation mends. 128 is added by turning the sign over.
    const __m512i low = _mm512_packs_epi32(rounded[0], rounded[1]), high = _mm512_packs_epi32(rounded[2], rounded[3]);
    const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
    _mm512_storeu_si512(data + begin, _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)));
    scale[group] = peak / 127.0f * (ROTATED ? kRotation : 1.0f);
  }
  if (!NORMED) return;
  // The norm is one factor a row: rounding does not see it, the scales take it.
  const float norm = 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / static_cast<float>(r.width) + r.eps);
  for (int64_t group = 0; group < r.groups; ++group) scale[group] *= norm;
}

void round_row(const Rounding& r, int64_t row) {
  if (r.gain != nullptr)
    r.rotated ? round_numbers<true, true>(r, row) : round_numbers<true, false>(r, row);
  else
    r.rotated ? round_numbers<false, true>(r, row) : round_numbers<false, false>(r, row);
}

}  // namespace

const Kernels kVnniKernels = {block, round_row};

}  // namespace jaxserve::int8

#endif
