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

// The same values, of that type, one after another in memory.
inline Tensor dense(const Tensor& t, ScalarType dtype) { return torch::stable::contiguous(torch::stable::to(t, dtype)); }

// Whether the channels of a map (B, C, H, W) lie side by side; so does mgd_ops.is_channels_last.
inline bool is_channels_last(const Tensor& map) { return map.stride(1) == 1 && map.stride(3) != 1; }

// Memory for a map (B, C, H, W).
inline Tensor empty_map(int64_t batch, int64_t channels, int64_t height, int64_t width, ScalarType dtype,
                        torch::stable::Device device, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  const MemoryFormat format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return torch::stable::empty({batch, channels, height, width}, dtype, std::nullopt, device, std::nullopt, format);
}

// Memory for the gradient of a map: dense, and channels_last where the map is.
inline Tensor empty_gradient(const Tensor& map) {
  return empty_map(map.size(0), map.size(1), map.size(2), map.size(3), map.scalar_type(), map.device(), is_channels_last(map));
}

}  // namespace mgd
