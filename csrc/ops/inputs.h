// The arguments of an op as a struct whose members take them by their names in the schema:
//
//   struct GatherInputs : Inputs<schemas::gather> {
//     using Inputs::Inputs;
//     const Tensor& x = take<"x">();
//     ...
//   };
//   Tensor gather(const GatherInputs& in);   // for a device
//   implement<&gather>(m);                   // registers it
//
// A name that is not in the schema does not compile.
#pragma once

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>

#include "common.h"
#include "schemas.h"

namespace fomoe::ops {

template <ArgumentType kType>
constexpr auto* type_of() {
  using enum ArgumentType;
  if constexpr (kType == tensor) return static_cast<Tensor*>(nullptr);
  if constexpr (kType == optional_tensor) return static_cast<std::optional<Tensor>*>(nullptr);
  if constexpr (kType == tensors) return static_cast<std::vector<Tensor>*>(nullptr);
  if constexpr (kType == integer) return static_cast<int64_t*>(nullptr);
  if constexpr (kType == integers) return static_cast<std::vector<int64_t>*>(nullptr);
  if constexpr (kType == number) return static_cast<double*>(nullptr);
  if constexpr (kType == numbers) return static_cast<std::vector<double>*>(nullptr);
  if constexpr (kType == boolean) return static_cast<bool*>(nullptr);
}

template <const Schema& kSchema, class Places = std::make_index_sequence<kSchema.count()>>
struct ValuesOf;
template <const Schema& kSchema, size_t... kPlaces>
struct ValuesOf<kSchema, std::index_sequence<kPlaces...>> {
  using Type =
      std::tuple<const std::remove_pointer_t<decltype(type_of<kSchema.type(kPlaces)>())>&...>;
};

template <size_t kSize>
struct ArgumentName {
  consteval ArgumentName(const char (&name)[kSize]) { std::copy_n(name, kSize, text); }
  char text[kSize];
};

// Lives as long as a call of the op: its members refer to what torch has passed.
template <const Schema& kSchemaOfOp>
class Inputs {
 public:
  static constexpr const Schema& kSchema = kSchemaOfOp;
  using Values = typename ValuesOf<kSchemaOfOp>::Type;

  explicit Inputs(const Values& values) : values_(values) {}
  Inputs(const Inputs&) = delete;
  Inputs& operator=(const Inputs&) = delete;

 protected:
  template <ArgumentName kName>
  const auto& take() const {
    constexpr size_t place = kSchema.place_of(kName.text);
    static_assert(place < kSchema.count(), "the schema has no argument of this name");
    return std::get<place>(values_);
  }

 private:
  const Values& values_;
};

// An op's function of its inputs as one of its arguments in order, as torch calls it.
template <auto kOp, class Function = decltype(kOp), class Values = void>
struct InOrder;
template <auto kOp, class Result, class Given>
struct InOrder<kOp, Result (*)(const Given&), void>
    : InOrder<kOp, Result (*)(const Given&), typename Given::Values> {
  static constexpr const Schema& kSchema = Given::kSchema;
};
template <auto kOp, class Result, class Given, class... Arguments>
struct InOrder<kOp, Result (*)(const Given&), std::tuple<Arguments...>> {
  static Result call(Arguments... arguments) {
    const std::tuple<Arguments...> values(arguments...);
    return kOp(Given(values));
  }
};

// Registers a device's function of an op, under the name in its schema.
template <auto kOp, class Library>
void implement(Library& library) {
  using Op = InOrder<kOp>;
  library.impl(std::string(Op::kSchema.name()).c_str(), TORCH_BOX((&Op::call)));
}

}  // namespace fomoe::ops
