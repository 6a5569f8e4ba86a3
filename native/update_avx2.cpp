// The update rules, compiled for AVX2 (-mavx2 -mfma -mf16c); empty on other processors.
#if defined(__AVX2__)
#include "avx2.h"
#include "update.h"

namespace lorica {

extern const Kernels avx2;
const Kernels avx2 = {update<Avx2>, square_sum<Avx2>};

}  // namespace lorica
#endif
