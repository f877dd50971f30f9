// One row of logits to its token, for one instruction set. Included once per set, by sampling.cc, with
//   ISA  the namespace,
//   AT   the function attribute that enables the set,
//   W    floats a vector.
// A row stays in the second-level cache from its first pass on, and most rows need one or two: the maxima of blocks of
// 64 tell every later pass which blocks it can leave out. z is (logit - maximum) / temperature, at most 0.

namespace ISA {

#include "vectors.h"

INLINE const float* block_at(const Row& row, int64_t block) {
  return block < row.vocab / BLOCK ? row.x + block * BLOCK : row.tail;
}

INLINE float sum_lanes_pairwise(const vf (&parts)[4]) { return sum_lanes((parts[0] + parts[1]) + (parts[2] + parts[3])); }

// The maximum of each block and, returned, of all.
AT static float block_peaks(const Row& row, float* peaks) {
  float best = -INFINITY;
  for (int64_t n = 0; n < row.blocks; ++n) {
    const float* p = block_at(row, n);
    vf most = load(p);
    for (int i = W; i < BLOCK; i += W) most = vmax(most, load(p + i));
    peaks[n] = max_lanes(most);
    best = peaks[n] > best ? peaks[n] : best;
  }
  return best;
}

// The lowest id of the row's maximum.
AT static int32_t first_of(const Row& row, const float* peaks, float peak) {
  for (int64_t n = 0; n < row.blocks; ++n) {
    if (peaks[n] != peak) continue;
    const float* p = block_at(row, n);
    for (int64_t i = n * BLOCK; i < std::min<int64_t>(row.vocab, (n + 1) * BLOCK); ++i)  // not its padding
      if (*p++ == peak) return static_cast<int32_t>(i);
  }
  return 0;  // nothing is allowed, or nothing is a number
}

INLINE vf weight_of(vf logit, const Scale& scale, float low) {
  const vf z = (logit - splat(scale.peak)) * splat(scale.inverse);
  return keep_from(vexp(z), z, splat(low));
}

// The weight e^z of each block's tokens with z >= low, and of all.
AT static double block_sums(const Row& row, const float* peaks, const Scale& scale, float low, float* sums) {
  double total = 0;
  for (int64_t n = 0; n < row.blocks; ++n) {
    sums[n] = 0;
    if (!((peaks[n] - scale.peak) * scale.inverse >= low)) continue;
    const float* p = block_at(row, n);
    vf parts[4] = {};
    for (int i = 0; i < BLOCK; i += W) parts[i / W % 4] += weight_of(load(p + i), scale, low);
    sums[n] = sum_lanes_pairwise(parts);
    total += sums[n];
  }
  return total;
}

// Appends the z of every token with z >= cut to `out`, which has room for W more; returns how many.
AT static int64_t gather(const Row& row, const float* peaks, const Scale& scale, float cut, float* out) {
  int64_t count = 0;
  for (int64_t n = 0; n < row.blocks; ++n) {
    if (!((peaks[n] - scale.peak) * scale.inverse >= cut)) continue;
    const float* p = block_at(row, n);
    for (int i = 0; i < BLOCK; i += W) {
      const vf z = (load(p + i) - splat(scale.peak)) * splat(scale.inverse);
#if W == 16
      const __mmask16 keep = _mm512_cmp_ps_mask((__m512)z, _mm512_set1_ps(cut), _CMP_GE_OQ);
      if (keep == 0) continue;
      store(out + count, (vf)_mm512_maskz_compress_ps(keep, (__m512)z));
      count += __builtin_popcount(keep);
#else
      for (int j = 0; j < W; ++j) {
        out[count] = z[j];
        count += z[j] >= cut;
      }
#endif
    }
  }
  return count;
}

// The weight of those of n candidates with z >= pivot: their number, or the sum of e^z.
template <bool MASS>
AT static double weight_from(float* z, int64_t n, float pivot) {
  for (int i = 0; i < W; ++i) z[n + i] = -INFINITY;
  double total = 0;
  for (int64_t i = 0; i < n;) {  // float32 sums of 1,024 numbers at most
    vf sum = {};
    for (const int64_t end = i + 64 * W; i < n && i < end; i += W) {
      const vf x = load(z + i);
      sum += keep_from(MASS ? vexp(x) : splat(1.0f), x, splat(pivot));
    }
    total += sum_lanes(sum);
  }
  return total;
}

// Keeps the candidates on one side of the pivot, in place; returns how many.
template <bool FROM>
AT static int64_t keep_side(float* z, int64_t n, float pivot) {
  int64_t count = 0;
#if W == 16
  for (int64_t i = 0; i < n; i += W) {
    const __m512 x = (__m512)load(z + i);
    __mmask16 keep = FROM ? _mm512_cmp_ps_mask(x, _mm512_set1_ps(pivot), _CMP_GE_OQ)
                          : _mm512_cmp_ps_mask(x, _mm512_set1_ps(pivot), _CMP_LT_OQ);
    if (n - i < W) keep &= static_cast<__mmask16>((1u << (n - i)) - 1);
    store(z + count, (vf)_mm512_maskz_compress_ps(keep, x));
    count += __builtin_popcount(keep);
  }
#else
  for (int64_t i = 0; i < n; ++i) {
    const float x = z[i];
    z[count] = x;
    count += FROM ? x >= pivot : x < pivot;
  }
#endif
  return count;
}

// The highest candidate t for which the candidates with z >= t weigh at least `need`; the lowest one when all of them
// weigh less. Halves the range of z and keeps the half with the answer, so the passes get shorter. Reorders z.
template <bool MASS>
AT static float select(float* z, int64_t n, double need) {
  double above = 0;
  while (n > kSortedCandidates) {
    float low = z[0], high = z[0];
    {
      vf least = splat(-z[0]), most = splat(z[0]);
      int64_t i = 0;
      for (; i + W <= n; i += W) {
        const vf x = load(z + i);
        least = vmax(least, -x);
        most = vmax(most, x);
      }
      low = -max_lanes(least);
      high = max_lanes(most);
      for (; i < n; ++i) {
        low = z[i] < low ? z[i] : low;
        high = z[i] > high ? z[i] : high;
      }
    }
    if (!(low < high)) return low;
    float pivot = low + (high - low) * 0.5f;
    if (!(pivot > low && pivot < high)) pivot = high;
    const double from = weight_from<MASS>(z, n, pivot);
    if (above + from >= need) {
      n = keep_side<true>(z, n, pivot);
    } else {
      above += from;
      n = keep_side<false>(z, n, pivot);
    }
  }
  std::sort(z, z + n, [](float a, float b) { return a > b; });
  for (int64_t i = 0; i < n; ++i) {
    above += MASS ? vexp(splat(z[i]))[0] : 1.0f;
    if (above >= need && (i + 1 == n || z[i + 1] < z[i])) return z[i];  // ties stay together
  }
  return n > 0 ? z[n - 1] : -INFINITY;
}

// The lowest z that the row's filters keep.
AT static float lowest_kept(const Row& row, const float* peaks, const Scale& scale, const Filters& filters) {
  float low = filters.min_p > 0 ? std::log(filters.min_p) : -INFINITY;
  float* const z = static_cast<float*>(scratch(kCandidates, sizeof(float) * (row.vocab + BLOCK + 2 * W)));
  float* const copy = static_cast<float*>(scratch(kCopy, sizeof(float) * (row.vocab + BLOCK + 2 * W)));
  int64_t count = -1;  // candidates that hold every token with z >= low; -1 while there are none
  if (filters.top_k > 0 && filters.top_k < row.vocab) {
    // At least k tokens reach the k-th largest of the blocks' maxima.
    float cut = -FLT_MAX;
    if (filters.top_k <= row.blocks) {
      std::memcpy(copy, peaks, sizeof(float) * row.blocks);
      std::nth_element(copy, copy + filters.top_k - 1, copy + row.blocks, [](float a, float b) { return a > b; });
      cut = std::max(cut, (copy[filters.top_k - 1] - scale.peak) * scale.inverse);
    }
    count = gather(row, peaks, scale, cut, z);
    if (count >= filters.top_k) {
      std::memcpy(copy, z, sizeof(float) * count);
      low = std::max(low, select<false>(copy, count, filters.top_k));
    }
  }
  if (filters.top_p < 1) {
    double need;
    if (count >= 0) {
      need = filters.top_p * weight_from<true>(z, count, low);
    } else {
      float* const sums = static_cast<float*>(scratch(kSums, sizeof(float) * row.blocks));
      need = filters.top_p * block_sums(row, peaks, scale, low, sums);
      for (const float cut : {-4.0f, -8.0f, -NEGLIGIBLE}) {  // most nuclei lie within e^-8 of the likeliest token
        count = gather(row, peaks, scale, std::max(cut, low), z);
        if (cut <= low || weight_from<true>(z, count, cut) >= need) break;
      }
    }
    low = std::max(low, select<true>(z, count, need));
  }
  return low;
}

// The first place whose running weight passes `target`, of those with weight; the last such one if rounding leaves none.
INLINE int64_t first_past(const float* weight, int64_t count, double target) {
  double end = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!(weight[i] > 0)) continue;
    end += weight[i];
    last = i;
    if (end > target) break;
  }
  return last;
}

AT static int32_t sample_row(const Row& row, const Filters& filters) {
  float* const peaks = static_cast<float*>(scratch(kPeaks, sizeof(float) * row.blocks));
  const float peak = block_peaks(row, peaks);
  if (filters.temperature < kGreedyTemperature) return first_of(row, peaks, peak);
  const Scale scale{std::isfinite(peak) ? peak : 0.0f, 1.0f / filters.temperature};
  const float low = filters.any(row.vocab) ? lowest_kept(row, peaks, scale, filters) : -INFINITY;
  float* const sums = static_cast<float*>(scratch(kSums, sizeof(float) * row.blocks));
  const double total = block_sums(row, peaks, scale, low, sums);
  const int64_t block = first_past(sums, row.blocks, filters.uniform[0] * total);
  const float* p = block_at(row, block);
  float weight[BLOCK];
  double inside = 0;
  for (int i = 0; i < BLOCK; i += W) store(weight + i, weight_of(load(p + i), scale, low));
  for (int i = 0; i < BLOCK; ++i) inside += weight[i];
  return static_cast<int32_t>(block * BLOCK + first_past(weight, BLOCK, filters.uniform[1] * inside));
}

// The row's logits after its edits, in `out`. The order and the formulas are ops/sampling/edits.py's.
AT static void edit_row(const float* x, int64_t vocab, const RowEdits& edits, float* out) {
  if (edits.seen != nullptr) {
    const float repetition = edits.repetition, presence = edits.presence, frequency = edits.frequency;
    for (int64_t i = 0; i < vocab; ++i) {
      const int32_t seen = edits.seen[i], times = seen & (PROMPT_BIT - 1);
      const float factor = seen != 0 ? repetition : 1.0f;
      const float scaled = x[i] > 0 ? x[i] / factor : x[i] * factor;
      out[i] = scaled - frequency * static_cast<float>(times) - (times > 0 ? presence : 0.0f);
    }
  } else {
    std::memcpy(out, x, sizeof(float) * vocab);
  }
  for (int64_t i = 0; i < edits.num_bias; ++i)
    if (edits.bias_ids[i] >= 0 && edits.bias_ids[i] < vocab) out[edits.bias_ids[i]] += edits.bias_values[i];
  for (int64_t i = 0; i < edits.num_banned; ++i)
    if (edits.banned_ids[i] >= 0 && edits.banned_ids[i] < vocab) out[edits.banned_ids[i]] = -INFINITY;
  if (edits.mask == nullptr) return;
  for (int64_t word = 0; word * 32 < vocab; ++word) {
    const uint32_t bits = edits.mask[word];
    if (bits == ~0u) continue;
    float* const to = out + word * 32;
    const int here = static_cast<int>(std::min<int64_t>(32, vocab - word * 32));
    for (int i = 0; i < here; ++i) to[i] = bits >> i & 1 ? to[i] : -INFINITY;
  }
}

// Log-softmax at one token and at the `num_top` likeliest, likeliest first, the lowest id first on ties.
AT static void logprob_row(const Row& row, int32_t token, int num_top, float* chosen, int32_t* rank, int32_t* ids,
                           float* values) {
  float* const peaks = static_cast<float*>(scratch(kPeaks, sizeof(float) * row.blocks));
  float* const sums = static_cast<float*>(scratch(kSums, sizeof(float) * row.blocks));
  const float peak = block_peaks(row, peaks);
  const Scale scale{std::isfinite(peak) ? peak : 0.0f, 1.0f};
  const float norm = scale.peak + static_cast<float>(std::log(block_sums(row, peaks, scale, -INFINITY, sums)));
  const float here = row.x[token];
  int32_t before = 0;
  for (int64_t i = 0; i < row.vocab; ++i) before += row.x[i] >= here;
  *chosen = here - norm;
  *rank = before;
  if (num_top == 0) return;
  // The likeliest lie in blocks whose maxima are among the num_top largest.
  float cut = -INFINITY;
  if (num_top < row.blocks) {
    std::memcpy(sums, peaks, sizeof(float) * row.blocks);
    std::nth_element(sums, sums + num_top - 1, sums + row.blocks, [](float a, float b) { return a > b; });
    cut = sums[num_top - 1];
  }
  std::vector<std::pair<float, int32_t>> best;
  for (int64_t n = 0; n < row.blocks; ++n) {
    if (!(peaks[n] >= cut)) continue;
    const float* p = block_at(row, n);
    for (int64_t i = n * BLOCK; i < std::min<int64_t>(row.vocab, (n + 1) * BLOCK); ++i, ++p)
      if (*p >= cut) best.push_back({-*p, static_cast<int32_t>(i)});
  }
  const int64_t found = std::min<int64_t>(num_top, best.size());
  std::partial_sort(best.begin(), best.begin() + found, best.end());
  for (int64_t i = 0; i < num_top; ++i) {
    ids[i] = i < found ? best[i].second : 0;
    values[i] = i < found ? -best[i].first - norm : -INFINITY;
  }
}

}  // namespace ISA

#undef INLINE
