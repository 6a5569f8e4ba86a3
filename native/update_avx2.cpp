// The update rules, compiled for AVX2 (-mavx2 -mfma -mf16c); empty on other processors.
#if defined(__AVX2__)
#include "compact.h"
#include "whole_avx2.h"

namespace lorica {

extern const Kernels avx2;
const Kernels avx2 = {update_any<WholeAvx2>, square_sum<Avx2>};

}  // namespace lorica
#endif
