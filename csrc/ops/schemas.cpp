// Makes the ops known to torch. Kernels for a device are registered beside the op's own code.
#include "schemas.h"

#include "common.h"

namespace fomoe::ops {
namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(FOMOE_NAMESPACE, m) {
  for (const Schema* schema : schemas::kAll) m.def(schema->text());
}

}  // namespace
}  // namespace fomoe::ops
