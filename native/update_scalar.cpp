// The update rules, compiled for any processor.
#include "scalar.h"
#include "update.h"

namespace lorica {

extern const Kernels scalar;
const Kernels scalar = {update<Scalar>, square_sum<Scalar>};

}  // namespace lorica
