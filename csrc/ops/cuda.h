// What the CUDA ops share: the device and stream of a call, errors of launches, registration.
//
// The emulator (tests/emulator) compiles the same ops for CPU tensors into a namespace of its own.
#pragma once

#include "common.h"
#ifndef FOMOE_EMULATED
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

#ifdef FOMOE_EMULATED
#define FOMOE_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(FOMOE_NAMESPACE, CPU, m)
extern "C" const char* fomoe_emulator_last_error();
#else
#define FOMOE_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(FOMOE_NAMESPACE, CUDA, m)
#endif

namespace fomoe::ops {

#ifdef FOMOE_EMULATED

// The device of a call: the tensor's, which runs its kernels at once.
class DeviceOf {
 public:
  DeviceOf(const Tensor& tensor, const char* name) { check(tensor, name).cpu(); }
  void* stream() const { return nullptr; }
};

#else

// Makes the device of a CUDA tensor the current one as long as it lives. ValueError naming the
// tensor when it is elsewhere.
class DeviceOf {
 public:
  DeviceOf(const Tensor& tensor, const char* name) {
    check(tensor, name).cuda();
    index_ = tensor.get_device_index();
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
  int32_t index_ = 0;
  CUDAGuardHandle guard_ = nullptr;
};

#endif

// `error` is what a kernel's entry point returned.
inline void check_launch(int error, const char* verb) {
  if (error == 0) return;
  std::string message = std::string(verb) + ": CUDA error " + std::to_string(error) + " at launch";
#ifdef FOMOE_EMULATED
  message += std::string("\n") + fomoe_emulator_last_error();
#endif
  throw std::runtime_error(message);
}

}  // namespace fomoe::ops
