// Low-rank adapters' kernels for any CPU with vectors of four floats.

#include "lora.h"

#define AT
#define W 4
#define TOKENS 2
#define COLS 2
#include "lora_kernels.h"

namespace jaxserve::lora {
template <>
Kernels generic_kernels<float>() {
  return kernels<float>();
}
template <>
Kernels generic_kernels<Bits>() {
  return kernels<Bits>();
}
}  // namespace jaxserve::lora
