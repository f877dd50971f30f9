// Low-rank adapters' kernels for any CPU with vectors of four floats.

#include "lora.h"

#define AT
#define W 4
#define TOKENS 2
#define COLS 2
#include "lora_kernels.h"

namespace jaxserve::lora {
Kernels generic_kernels() { return kernels(); }
}  // namespace jaxserve::lora
