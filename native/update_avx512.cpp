// The update rules, compiled for AVX-512 (-mavx512f); empty on other processors.
#if defined(__AVX512F__)
#include "compact.h"
#include "whole_avx512.h"

namespace lorica {

extern const Kernels avx512;
const Kernels avx512 = {update_any<WholeAvx512>, square_sum<Avx512>};

}  // namespace lorica
#endif
