// Paged attention's kernels for AVX-512 without products of bfloat16.

#include "attention.h"

#if JAXSERVE_X86
#define AT TARGET_AVX512
#define W 16
#define ROWS 6
#define COLS 4
#define BF16_DOT 0
#define VNNI 0
#include "attention_kernels.h"

namespace jaxserve::attention {
Kernels avx512_kernels() { return kernels(); }
}  // namespace jaxserve::attention
#endif
