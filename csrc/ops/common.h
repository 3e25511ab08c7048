// What every op needs from torch: checks with readable messages, dtypes, allocation.
// LibTorch's stable ABI only, so that one build serves every torch >= 2.10.
//
// Errors are exceptions: std::invalid_argument arrives in Python as ValueError (a bad argument),
// std::runtime_error as RuntimeError.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../kernels.h"

// Where the ops are found: torch.ops.<namespace>.
#ifndef FOMOE_NAMESPACE
#define FOMOE_NAMESPACE fomoe
#endif

namespace fomoe::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- errors --------------------------------------------------------------------------------------

template <class... Parts>
[[noreturn]] void bad_argument(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// require(top_k >= 1, "top_k: got ", top_k, ", wanted at least 1");
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) bad_argument(parts...);
}

// The status of a C function of torch's. (The macros for it have other names in other versions.)
inline void require_success(int32_t status, const char* what) {
  if (status != 0) throw std::runtime_error(std::string(what) + " failed in torch");
}

// ---- names for messages --------------------------------------------------------------------------

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return torch::headeronly::toString(type);
  }
}

template <class Sizes>
std::string shape_name(const Sizes& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) {
    if (text.size() > 1) text += ", ";
    text += size < 0 ? "*" : std::to_string(size);
  }
  return text + "]";
}

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another device";
}

// ---- checks --------------------------------------------------------------------------------------

constexpr int64_t kAny = -1;  // any size, in a wanted shape
constexpr std::initializer_list<ScalarType> kFloatTypes = {ScalarType::Float, ScalarType::BFloat16,
                                                           ScalarType::Half};

// A chain of demands on one argument; each throws ValueError naming the argument, what came and
// what was wanted:   check(x, "x").same_device(weight, "weight").dtype(kFloatTypes)
//                        .shape({kAny, hidden}).contiguous();
class check {
 public:
  check(const Tensor& tensor, const char* name) : tensor_(tensor), name_(name) {
    require(tensor.defined(), name, ": got an undefined tensor");
  }

  const check& cpu() const {
    require(tensor_.is_cpu(), name_, ": is on ", device_name(tensor_), ", wanted cpu");
    return *this;
  }

  const check& cuda() const {
    require(tensor_.is_cuda(), name_, ": is on ", device_name(tensor_), ", wanted cuda");
    return *this;
  }

  const check& same_device(const Tensor& other, const char* other_name) const {
    const std::string got = device_name(tensor_), wanted = device_name(other);
    require(got == wanted, name_, ": is on ", got, ", wanted ", wanted, " as ", other_name);
    return *this;
  }

  const check& dtype(std::initializer_list<ScalarType> wanted) const {
    const ScalarType got = tensor_.scalar_type();
    for (const ScalarType type : wanted) {
      if (got == type) return *this;
    }
    std::string names;
    for (const ScalarType type : wanted) {
      if (!names.empty()) names += " or ";
      names += dtype_name(type);
    }
    bad_argument(name_, ": has dtype ", dtype_name(got), ", wanted ", names);
  }

  const check& dtype(ScalarType wanted) const { return dtype({wanted}); }

  const check& same_dtype(const Tensor& other, const char* other_name) const {
    const ScalarType got = tensor_.scalar_type(), wanted = other.scalar_type();
    require(got == wanted, name_, ": has dtype ", dtype_name(got), ", wanted ", dtype_name(wanted),
            " as ", other_name);
    return *this;
  }

  const check& shape(std::initializer_list<int64_t> wanted) const {
    const auto got = tensor_.sizes();
    bool same = got.size() == wanted.size();
    size_t dim = 0;
    for (const int64_t size : wanted) {
      if (!same) break;
      same = size == kAny || size == got[dim];
      ++dim;
    }
    require(same, name_, ": has shape ", shape_name(got), ", wanted ", shape_name(wanted));
    return *this;
  }

  const check& contiguous() const {
    require(tensor_.is_contiguous(), name_, ": is not contiguous (shape ",
            shape_name(tensor_.sizes()), ", strides ", shape_name(tensor_.strides()),
            "), call .contiguous()");
    return *this;
  }

 private:
  const Tensor& tensor_;
  const char* name_;
};

// ---- numbers -------------------------------------------------------------------------------------

// The value as int32, within [low, high].
inline int32_t as_int32(int64_t value, const char* name,
                        int64_t low = std::numeric_limits<int32_t>::min(),
                        int64_t high = std::numeric_limits<int32_t>::max()) {
  require(value >= low && value <= high, name, ": got ", value, ", wanted ", low, " .. ", high);
  return static_cast<int32_t>(value);
}

inline Activation as_activation(int64_t value) {
  return static_cast<Activation>(as_int32(value, "activation", 0, 5));
}

inline Scoring as_scoring(int64_t value) {
  return static_cast<Scoring>(as_int32(value, "scoring", 0, 1));
}

// ---- tensors -------------------------------------------------------------------------------------

// The kernels' name of the dtype; ValueError for one they do not store.
inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: check(tensor, name).dtype(kFloatTypes);
  }
  bad_argument(name, ": unexpected dtype");
}

// Uninitialised, contiguous, on the device of `like`; dtype of `like` unless given.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                    std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
}

template <class T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

template <class T>
T* mutable_pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace fomoe::ops
