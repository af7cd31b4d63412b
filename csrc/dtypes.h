// The element types of features, and the types that sums over them are kept in.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <type_traits>

namespace mgd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
using acc_of = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f with a value of the C++ type of `dtype`.
template <typename F>
void dispatch(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Double: return f(double{});
    case ScalarType::Float: return f(float{});
    case ScalarType::Half: return f(c10::Half{});
    case ScalarType::BFloat16: return f(c10::BFloat16{});
    default: STD_TORCH_CHECK(false, "mgd: features must be float64, float32, float16 or bfloat16");
  }
}

inline ScalarType acc_type(ScalarType dtype) { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

}  // namespace mgd
