// Paged attention's kernels for AVX2.

#include "attention.h"

#if JAXSERVE_X86
#define AT TARGET_AVX2
#define W 8
#define ROWS 6
#define COLS 2
#define BF16_DOT 0
#define VNNI 0
#include "attention_kernels.h"

namespace jaxserve::attention {
Kernels avx2_kernels() { return kernels(); }
}  // namespace jaxserve::attention
#endif
