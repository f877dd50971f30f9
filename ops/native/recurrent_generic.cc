// Recurrent layers' kernels for any CPU with vectors of four floats.

#include "recurrent.h"

#define AT
#define W 4
#include "recurrent_kernels.h"

namespace jaxserve::recurrent {
Kernels generic_kernels() { return kernels(); }
}  // namespace jaxserve::recurrent
