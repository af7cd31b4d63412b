// The element types of features and logits, the types that sums over them are kept in, and the layout of their gradients.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
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
    default: STD_TORCH_CHECK(false, "mgd: features and logits must be float64, float32, float16 or bfloat16");
  }
}

inline ScalarType acc_type(ScalarType dtype) { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// Memory for the gradient of a map (B, C, H, W): dense, and channels_last where the map is, by mgd_ops.is_channels_last.
inline Tensor empty_gradient(const Tensor& map) {
  const bool channels_last = map.stride(1) == 1 && map.stride(3) != 1;
  return torch::stable::empty({map.size(0), map.size(1), map.size(2), map.size(3)}, map.scalar_type(), std::nullopt, map.device(),
                              std::nullopt,
                              channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
}

}  // namespace mgd
