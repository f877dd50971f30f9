// Paged attention's kernels for any CPU with vectors of four floats.

#include "attention.h"

#define AT
#define W 4
#define ROWS 4
#define COLS 2
#define BF16_DOT 0
#define VNNI 0
#include "attention_kernels.h"

namespace jaxserve::attention {
Kernels generic_kernels() { return kernels(); }
}  // namespace jaxserve::attention
