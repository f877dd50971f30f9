// Recurrent layers' kernels for AVX2.

#include "recurrent.h"

#if JAXSERVE_X86
#define AT TARGET_AVX2
#define W 8
#include "recurrent_kernels.h"

namespace jaxserve::recurrent {
Kernels avx2_kernels() { return kernels(); }
}  // namespace jaxserve::recurrent
#endif
