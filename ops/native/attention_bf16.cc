// Paged attention's kernels for AVX-512 with VNNI and products of bfloat16.

#include "attention.h"

#if JAXSERVE_X86
#define AT TARGET_BF16
#define W 16
#define ROWS 6
#define COLS 4
#define BF16_DOT 1
#define VNNI 1
#include "attention_kernels.h"

namespace jaxserve::attention {
Kernels bf16_kernels() { return kernels(); }
}  // namespace jaxserve::attention
#endif
