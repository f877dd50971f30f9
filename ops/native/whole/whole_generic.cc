// Attention of towers in plain C++.

#define AT
#define W 4
#include "whole_kernels.h"

namespace jaxserve::whole {
Kernels generic_kernels() { return {lay, attend}; }
}  // namespace jaxserve::whole
