// Reads the text of an op's schema when the ops are compiled: names, types and places of arguments.
#pragma once

#include <cstddef>
#include <string_view>

namespace fomoe::ops {

enum class ArgumentType {
  tensor,
  optional_tensor,
  tensors,
  integer,
  integers,
  number,
  numbers,
  boolean,
};

// "name(Tensor x, Tensor(a!)? total, int[] begins) -> Tensor", as torch writes it.
class Schema {
 public:
  constexpr Schema(const char* text) : text_(text), view_(text) {}  // NOLINT: from its text

  constexpr const char* text() const { return text_; }
  constexpr std::string_view name() const { return view_.substr(0, view_.find('(')); }

  constexpr size_t count() const {
    size_t number = 0;
    while (!argument(number).empty()) ++number;
    return number;
  }

  // The place of an argument; count() for a name that is none.
  constexpr size_t place_of(std::string_view wanted) const {
    size_t at = 0;
    while (!argument(at).empty() && name_in(argument(at)) != wanted) ++at;
    return at;
  }

  constexpr ArgumentType type(size_t at) const {
    const std::string_view all = argument(at), type = all.substr(0, all.rfind(' '));
    const bool tensor = type.starts_with("Tensor");
    if (type.ends_with("[]")) {
      return tensor                    ? ArgumentType::tensors
             : type.starts_with("int") ? ArgumentType::integers
                                       : ArgumentType::numbers;
    }
    if (tensor) return type.ends_with('?') ? ArgumentType::optional_tensor : ArgumentType::tensor;
    if (type == "int") return ArgumentType::integer;
    if (type == "float") return ArgumentType::number;
    if (type == "bool") return ArgumentType::boolean;
    throw "a type that ArgumentType does not have";
  }

 private:
  static constexpr std::string_view name_in(std::string_view argument) {
    return argument.substr(argument.rfind(' ') + 1);
  }

  // Type and name of an argument; empty past the last.
  constexpr std::string_view argument(size_t wanted) const {
    size_t begin = view_.find('(') + 1, depth = 0, number = 0;
    for (size_t at = begin; at < view_.size(); ++at) {
      const char c = view_[at];
      const bool ends = depth == 0 && (c == ',' || c == ')');
      if (ends && number == wanted) return view_.substr(begin, at - begin);
      if (ends && c == ')') return {};
      if (ends) ++number, begin = at + 2;  // past ", "
      if (c == '(') ++depth;
      if (c == ')') --depth;
    }
    throw "a schema without its closing bracket";
  }

  const char* text_;
  std::string_view view_;
};

}  // namespace fomoe::ops
