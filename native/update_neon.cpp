// The update rules, compiled for NEON; empty on other processors.
#if defined(__aarch64__)
#include "compact.h"
#include "whole_neon.h"

namespace lorica {

extern const Kernels neon;
const Kernels neon = {update_any<WholeNeon>, square_sum<Neon>};

}  // namespace lorica
#endif
