// combine as a torch op on CUDA.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "combine.h"

namespace fomoe::ops {
namespace {

// Makes a tensor's device the current one as long as it lives.
class DeviceOf {
 public:
  explicit DeviceOf(const Tensor& tensor) : index_(tensor.get_device_index()) {
    require_success(aoti_torch_create_cuda_guard(index_, &guard_), "choosing a CUDA device");
  }
  ~DeviceOf() { aoti_torch_delete_cuda_guard(guard_); }
  DeviceOf(const DeviceOf&) = delete;
  DeviceOf& operator=(const DeviceOf&) = delete;

  // The stream that torch's own ops would use now.
  void* stream() const {
    void* stream = nullptr;
    require_success(aoti_torch_get_current_cuda_stream(index_, &stream),
                    "asking for the CUDA stream");
    return stream;
  }

 private:
  int32_t index_;
  CUDAGuardHandle guard_ = nullptr;
};

void check_launch(int error, const char* verb) {
  if (error != 0) {
    throw std::runtime_error(std::string(verb) + ": CUDA error " + std::to_string(error) +
                             " at launch");
  }
}

Tensor combine(const Tensor& rows, const std::optional<Tensor>& weights,
               const Tensor& row_of_slot) {
  check(row_of_slot, "row_of_slot").cuda();
  check_combine(rows, weights, row_of_slot);
  Tensor y = empty(rows, {row_of_slot.size(0), rows.size(1)});
  const DeviceOf device(rows);
  check_launch(cuda::combine(combine_args(rows, weights, row_of_slot, y), device.stream()),
               "combine");
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(fomoe, CUDA, m) { m.impl("combine", TORCH_BOX(&combine)); }

}  // namespace
}  // namespace fomoe::ops
