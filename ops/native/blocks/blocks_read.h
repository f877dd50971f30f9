// How values that are stored in a few bits become bytes. Included by blocks_vnni.cc alone, in its namespace.

#pragma once

// Holds the compiler to an order and to a register: what is loaded and used twice else lies on the stack, for want of one for its address.
#define KEEP(vector) asm volatile("" : "+v"(vector))

// Loads that the compiler leaves in the order in which they are written.
AT FORCE_INLINE __m512i load_next(const uint8_t* from) {
  __m512i line;
  asm volatile("vmovdqu64 %1, %0" : "=v"(line) : "m"(*reinterpret_cast<const __m512i_u*>(from)));
  return line;
}

// How values are read: BITS as stored, with a table or without, `line` bytes from one line to the next. Upper halves of four bits
// may stay where they are, as 16 times the values, where somebody divides by that later.
template <int BITS, bool TABLE, bool UPPER>
struct Reader;

template <bool UPPER>
struct Reader<8, false, UPPER> {
  static constexpr int kQuads = 1, kLines = 1;  // inputs in fours that one `load` gives, and the lines it reads
  AT FORCE_INLINE static void load(const uint8_t* from, int64_t, __m512i, __m512i (&out)[kQuads]) {
    out[0] = _mm512_loadu_si512(from);
  }
};

template <bool TABLE, bool UPPER>
struct Reader<4, TABLE, UPPER> {
  static constexpr int kQuads = 2, kLines = 1;
  AT FORCE_INLINE static void load(const uint8_t* from, int64_t, __m512i table, __m512i (&out)[kQuads]) {
    const __m512i both = _mm512_loadu_si512(from), low = _mm512_set1_epi8(15);
    out[0] = _mm512_and_si512(both, low);
    out[1] = UPPER ? _mm512_andnot_si512(low, both) : _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    if (TABLE) {
      out[0] = _mm512_shuffle_epi8(table, out[0]);
      out[1] = _mm512_shuffle_epi8(table, out[1]);
    }
  }
};

template <bool UPPER>
struct Reader<6, false, UPPER> {
  static constexpr int kQuads = 4, kLines = 3;
  AT FORCE_INLINE static void load(const uint8_t* from, int64_t line, __m512i, __m512i (&out)[kQuads]) {
    __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + line), c = _mm512_loadu_si512(from + 2 * line);
    KEEP(a); KEEP(b); KEEP(c);
    split(a, b, c, out);
  }
  AT FORCE_INLINE static void split(__m512i a, __m512i b, __m512i c, __m512i (&out)[kQuads]) {
    const __m512i six = _mm512_set1_epi8(63);
    out[0] = _mm512_and_si512(a, six);
    out[1] = _mm512_and_si512(b, six);
    out[2] = _mm512_and_si512(c, six);
    // The upper bits of all three: 0xca takes of two operands the bits that the first one names.
    const __m512i two = _mm512_ternarylogic_epi32(_mm512_set1_epi8(3), _mm512_srli_epi16(a, 6), _mm512_srli_epi16(b, 4), 0xca);
    const __m512i all = _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), two, _mm512_srli_epi16(c, 2), 0xca);
    out[3] = _mm512_and_si512(all, six);
  }
};
