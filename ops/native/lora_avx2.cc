// Low-rank adapters' kernels for AVX2.

#include "lora.h"

#if JAXSERVE_X86
#define AT TARGET_AVX2
#define W 8
#define TOKENS 2
#define COLS 4
#include "lora_kernels.h"

namespace jaxserve::lora {
template <>
Kernels avx2_kernels<float>() {
  return kernels<float>();
}
template <>
Kernels avx2_kernels<Bits>() {
  return kernels<Bits>();
}
}  // namespace jaxserve::lora
#endif
