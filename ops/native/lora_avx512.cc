// Low-rank adapters' kernels for AVX-512.

#include "lora.h"

#if JAXSERVE_X86
#define AT TARGET_AVX512
#define W 16
#define TOKENS 4
#define COLS 4
#include "lora_kernels.h"

namespace jaxserve::lora {
template <>
Kernels avx512_kernels<float>() {
  return kernels<float>();
}
template <>
Kernels avx512_kernels<Bits>() {
  return kernels<Bits>();
}
}  // namespace jaxserve::lora
#endif
