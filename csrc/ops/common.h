// What every op needs from torch: checks of arguments, dtypes, allocation.
// LibTorch's stable ABI only, so that one build serves every torch >= 2.10.
//
// Errors are exceptions: std::invalid_argument arrives in Python as ValueError (a bad argument),
// std::runtime_error as RuntimeError.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <ostream>
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
[[noreturn, gnu::cold, gnu::noinline]] void bad_argument(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// require(top_k >= 1, "top_k must be at least 1, got ", top_k);
// Parts are made whether or not they are shown, so what costs time to write is written by its <<.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) bad_argument(parts...);
}

// Throws where a C function of torch has failed. (Torch's macros for it change names by version.)
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

// Writes sizes as [2, *, 3]; it refers to them.
struct ShapeName {
  const int64_t* begin;
  size_t count;

  friend std::ostream& operator<<(std::ostream& out, const ShapeName& shape) {
    out << '[';
    for (size_t dim = 0; dim < shape.count; ++dim) {
      if (dim > 0) out << ", ";
      if (shape.begin[dim] < 0) {
        out << '*';
      } else {
        out << shape.begin[dim];
      }
    }
    return out << ']';
  }
};

template <class Sizes>
ShapeName shape_name(const Sizes& sizes) {
  return {sizes.begin(), sizes.size()};
}

// Writes the device of a tensor, to which it refers.
struct DeviceName {
  const Tensor& tensor;

  friend std::ostream& operator<<(std::ostream& out, const DeviceName& device) {
    if (device.tensor.is_cpu()) return out << "cpu";
    if (device.tensor.is_cuda()) return out << "cuda:" << device.tensor.get_device_index();
    return out << "another device";
  }
};

inline DeviceName device_name(const Tensor& tensor) { return {tensor}; }

inline bool on_same_device(const Tensor& one, const Tensor& other) {
  if (one.is_cpu() || other.is_cpu()) return one.is_cpu() && other.is_cpu();
  return one.is_cuda() == other.is_cuda() && one.get_device_index() == other.get_device_index();
}

// ---- checks --------------------------------------------------------------------------------------

constexpr int64_t kAny = -1;  // in a shape that is checked: any size
constexpr std::initializer_list<ScalarType> kFloatTypes = {ScalarType::Float, ScalarType::BFloat16,
                                                           ScalarType::Half};

// A chain of checks of one argument; each throws ValueError "NAME must be WANTED, got VALUE":
//   check(x, "x").same_device(weight, "weight").dtype(kFloatTypes).shape({kAny, hidden});
class check {
 public:
  check(const Tensor& tensor, const char* name) : tensor_(tensor), name_(name) {
    require(tensor.defined(), name, " must be a tensor, got an undefined one");
  }

  const check& cpu() const {
    require(tensor_.is_cpu(), name_, " must be on cpu, got ", device_name(tensor_));
    return *this;
  }

  const check& cuda() const {
    require(tensor_.is_cuda(), name_, " must be on cuda, got ", device_name(tensor_));
    return *this;
  }

  const check& same_device(const Tensor& other, const char* other_name) const {
    require(on_same_device(tensor_, other), name_, " must be on ", device_name(other), " like ",
            other_name, ", got ", device_name(tensor_));
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
    bad_argument(name_, " must have dtype ", names, ", got ", dtype_name(got));
  }

  const check& dtype(ScalarType wanted) const { return dtype({wanted}); }

  const check& same_dtype(const Tensor& other, const char* other_name) const {
    const ScalarType got = tensor_.scalar_type(), wanted = other.scalar_type();
    if (got == wanted) return *this;
    bad_argument(name_, " must have dtype ", dtype_name(wanted), " like ", other_name, ", got ",
                 dtype_name(got));
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
    require(same, name_, " must have shape ", shape_name(wanted), ", got ", shape_name(got));
    return *this;
  }

  const check& contiguous() const {
    if (tensor_.is_contiguous()) return *this;
    bad_argument(name_, " must be contiguous, got shape ", shape_name(tensor_.sizes()),
                 " with strides ", shape_name(tensor_.strides()));
  }

 private:
  const Tensor& tensor_;
  const char* name_;
};

// ---- numbers -------------------------------------------------------------------------------------

// The value as int32; ValueError unless it is in low .. high.
inline int32_t as_int32(int64_t value, const char* name,
                        int64_t low = std::numeric_limits<int32_t>::min(),
                        int64_t high = std::numeric_limits<int32_t>::max()) {
  require(value >= low && value <= high, name, " must be in ", low, " .. ", high, ", got ", value);
  return static_cast<int32_t>(value);
}

// The enumerator with a number; names[number] is its name.
template <class Enum, size_t kCount>
Enum as_enum(int64_t number, const char* argument, const char* const (&names)[kCount]) {
  if (number >= 0 && number < int64_t(kCount)) return static_cast<Enum>(number);
  std::string known;
  for (const char* name : names) known += (known.empty() ? "" : ", ") + std::string(name);
  bad_argument(argument, " must be the number of one of ", known, ", got ", number);
}

inline Activation as_activation(int64_t number) {
  return as_enum<Activation>(number, "activation", kActivationNames);
}

inline Scoring as_scoring(int64_t number) {
  return as_enum<Scoring>(number, "scoring", kScoringNames);
}

// ---- tensors -------------------------------------------------------------------------------------

// The dtype as the kernels name it; ValueError for a dtype that they do not have.
inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: check(tensor, name).dtype(kFloatTypes);
  }
  bad_argument(name, " must have a dtype of the kernels");
}

// Uninitialised, contiguous, on the device of `like`; dtype of `like` unless given. It asks torch's
// allocator itself: torch::stable::new_empty would dispatch two operators for it.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                    std::optional<ScalarType> dtype = std::nullopt) {
  constexpr size_t kMostDims = 3;
  if (sizes.size() > kMostDims) throw std::logic_error("an op's result has more than 3 dimensions");
  int64_t strides[kMostDims];
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= std::max<int64_t>(sizes.begin()[dim], 1);
  }
  int32_t device_type = 0, device_index = 0, number = 0;
  require_success(aoti_torch_get_device_type(like.get(), &device_type), "asking for a device");
  require_success(aoti_torch_get_device_index(like.get(), &device_index), "asking for a device");
  if (dtype) {
    number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  } else {
    require_success(aoti_torch_get_dtype(like.get(), &number), "asking for a dtype");
  }
  AtenTensorHandle made = nullptr;
  require_success(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, number,
                                           device_type, device_index, &made),
                  "allocating a tensor");
  return Tensor(made);
}

// Sets all bytes to 0, in the order of the stream on CUDA.
inline void fill_zeros(const Tensor& tensor) {
  require_success(aoti_torch_zero_(tensor.get()), "filling a tensor with zeros");
}

// Gives the memory of a tensor back, unless other tensors share it; leaves the tensor without elements.
inline void give_back(const Tensor& tensor) {
  StableIValue stack[] = {torch::stable::detail::from(tensor)};
  require_success(torch_call_dispatcher("aten::set_", "", stack, TORCH_ABI_VERSION),
                  "giving memory back");
  torch::stable::detail::to<Tensor>(stack[0]);  // the result, which is the tensor itself
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
