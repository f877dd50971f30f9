// Recurrent layers' kernels for AVX-512.

#include "recurrent.h"

#if JAXSERVE_X86
#define AT TARGET_AVX512
#define W 16
#include "recurrent_kernels.h"

namespace jaxserve::recurrent {
Kernels avx512_kernels() { return kernels(); }
}  // namespace jaxserve::recurrent
#endif
