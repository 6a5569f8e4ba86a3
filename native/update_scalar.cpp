// The update rules, compiled for any processor.
#include "compact.h"
#include "whole_scalar.h"

namespace lorica {

extern const Kernels scalar;
const Kernels scalar = {update_any<WholeScalar>, square_sum<Scalar>};

}  // namespace lorica
