// Rows rounded by hand, in the same numbers as `round_row` of blocks_kernels.h: left to the compiler it takes six times as long, a tenth of
// eight rows' products. Included by blocks_vnni.cc, inside its namespace.

// The largest number or the sum of each of sixteen vectors: 4 l + m is that of vector 4 m + l.
template <bool LARGEST>
AT FORCE_INLINE __m512 of_two(__m512 a, __m512 b) {
  return LARGEST ? _mm512_max_ps(a, b) : _mm512_add_ps(a, b);
}
template <bool LARGEST>
AT FORCE_INLINE __m512 of_each(const __m512 (&v)[16]) {
  __m512 a[8], b[4], c[2];
  UNROLL
  for (int i = 0; i < 8; ++i) {
    const __m512 first = v[2 * i], second = v[2 * i + 1];
    a[i] = of_two<LARGEST>(_mm512_shuffle_f32x4(first, second, 0x44), _mm512_shuffle_f32x4(first, second, 0xee));
  }
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512 first = a[2 * i], second = a[2 * i + 1];
    b[i] = of_two<LARGEST>(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd));
  }
  UNROLL
  for (int i = 0; i < 2; ++i) {
    const __m512d first = _mm512_castps_pd(b[2 * i]), second = _mm512_castps_pd(b[2 * i + 1]);
    c[i] = of_two<LARGEST>(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)), _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
  }
  return of_two<LARGEST>(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xdd));
}

// The scales of a nest's steps, as `scale_of` has them.
AT FORCE_INLINE __m256 scales_of(const __m512 (&value)[16]) {
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  __m512 peaks[16], sums[16];
  UNROLL
  for (int i = 0; i < kSteps; ++i) {
    const __m512 a = value[2 * i], b = value[2 * i + 1];
    peaks[i] = _mm512_max_ps(a, b);
    peaks[kSteps + i] = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_min_ps(a, b));
    sums[i] = _mm512_abs_ps(a);
    sums[kSteps + i] = _mm512_abs_ps(b);
  }
  const __m512 peak = _mm512_permutexvar_ps(order, of_each<true>(peaks));
  const __m512 sum = _mm512_permutexvar_ps(order, of_each<false>(sums));
  const __m256 most = _mm512_castps512_ps256(peak), least = _mm512_extractf32x8_ps(peak, 1);
  const __m256 largest = _mm256_max_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
  const __m256 other = _mm256_max_ps(_mm256_mul_ps(_mm256_min_ps(most, least), _mm256_set1_ps(kOther)),
                                     _mm256_mul_ps(largest, _mm256_set1_ps(kTogether)));
  const __m256 size = _mm256_max_ps(_mm256_mul_ps(_mm256_max_ps(most, least), _mm256_set1_ps(kLargest)), other);
  const __m256 sign = _mm256_and_ps(_mm256_cmp_ps(most, least, _CMP_GT_OQ), _mm256_set1_ps(-0.0f));
  return _mm256_and_ps(_mm256_xor_ps(size, sign), _mm256_cmp_ps(size, _mm256_set1_ps(kLeast), _CMP_GT_OQ));
}

AT void round_fast(const Rounding& r, int64_t row) {
  constexpr int kVectors = kNest / kPanel;
  const float* x = r.x + row * r.width;
  Step* to = r.to.row(row);
  __m512 squares = _mm512_setzero_ps();
  for (int64_t nest = 0; nest * kSteps < r.to.steps; ++nest) {
    __m512 value[kVectors];
    const bool whole = (nest + 1) * kNest <= r.width;
    UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = nest * kNest + i * kPanel, left = r.width - at;
      const __mmask16 mask = whole || left >= kPanel ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
      value[i] = _mm512_maskz_loadu_ps(mask, x + at);
      if (r.gain == nullptr) continue;
      squares = _mm512_add_ps(squares, _mm512_mul_ps(value[i], value[i]));
      value[i] = _mm512_mul_ps(value[i], _mm512_maskz_loadu_ps(mask, r.gain + at));
    }
    if (r.rotated) {
      alignas(64) float group[kNest];
      UNROLL
      for (int i = 0; i < kVectors; ++i) _mm512_store_ps(group + i * kPanel, value[i]);
      for (int i = 0; i < kNest; i += int8::kGroup) int8::rotate_group(group + i);
      UNROLL
      for (int i = 0; i < kVectors; ++i) value[i] = _mm512_load_ps(group + i * kPanel);
    }
    alignas(32) float scale[kSteps], inverse[kSteps];
    const __m256 scales = scales_of(value);
    const __m256 zero = _mm256_cmp_ps(scales, _mm256_setzero_ps(), _CMP_EQ_OQ);
    _mm256_store_ps(scale, scales);
    _mm256_store_ps(inverse, _mm256_andnot_ps(zero, _mm256_div_ps(_mm256_set1_ps(1.0f), scales)));
    const int64_t steps = std::min<int64_t>(kSteps, r.to.steps - nest * kSteps);
    UNROLL
    for (int i = 0; i < kSteps; ++i) {
      if (i >= steps) break;
      const __m512 by = _mm512_set1_ps(inverse[i]);
      const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(value[2 * i], by));
      const __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(value[2 * i + 1], by));
      const __m256i all = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm512_cvtepi32_epi8(first)), _mm512_cvtepi32_epi8(second), 1);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to->value), all);
      const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), all);
      // Of each pair but the first, which is in the lowest 64 bits, the second quad's values times 128 more than the first's.
      const __m256i second_quads = _mm256_maskz_srli_epi64(0xe, all, 32);
      const __m256i crosses = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_xor_si256(all, _mm256_set1_epi8(-128)), second_quads);
      __m256i sum = _mm256_hadd_epi32(sums, crosses);
      sum = _mm256_hadd_epi32(sum, sum);  // of each half, and of its crosses
      const __m128i lower = _mm256_castsi256_si128(sum), upper = _mm256_extracti128_si256(sum, 1);
      to->scale = scale[i];
      to->minus_sum[0] = -_mm_cvtsi128_si32(lower);
      to->minus_sum[1] = -_mm_cvtsi128_si32(upper);
      to->zero_sum[0] = to->minus_sum[0] * (1 << kPairedZero);
      to->zero_sum[1] = to->minus_sum[1] * (1 << kPairedZero);
      to->start = kMagicBits - _mm_extract_epi32(_mm_add_epi32(lower, upper), 1);
      ++to;
    }
  }
  alignas(64) float lanes[kPanel];
  _mm512_store_ps(lanes, squares);
  finish_rounding(r, row, lanes);
}
