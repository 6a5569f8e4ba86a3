// The update rules, compiled for NEON; empty on other processors.
#if defined(__aarch64__)
#include "neon.h"
#include "update.h"

namespace lorica {

extern const Kernels neon;
const Kernels neon = {update<Neon>, square_sum<Neon>};

}  // namespace lorica
#endif
