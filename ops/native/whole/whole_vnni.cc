// Attention of towers for AVX-512 with VNNI.

#include "whole.h"

#if JAXSERVE_X86
#define AT TARGET_VNNI
#define W 16
#include "whole_kernels.h"

namespace jaxserve::whole {
Kernels vnni_kernels() { return {lay, attend}; }
}  // namespace jaxserve::whole
#endif
