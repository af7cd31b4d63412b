// Stands for CUDA's header of this name where test_cuda_on_cpu.py compiles the CUDA kernels for the CPU.
//
// Blocks run one after another, and so do the warps of a block, each until it waits for the block. Each thread is a fiber,
// which runs until it waits. So a missing barrier shows: one runs ahead of those that should have written what it reads.
// MGD_ORDER=reverse takes threads, warps and blocks the other way round. A barrier that some lanes of a warp do not reach is
// an error, and so is a launch that a GPU would refuse, or a write behind the dynamic shared memory, which starts as nan.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <vector>

using std::max;
using std::min;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
#define aoti_torch_get_current_cuda_stream(device, stream) AOTI_TORCH_SUCCESS

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define __global__
#define __device__
#define __shared__ static  // blocks share it too, one after another
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define threadIdx (emulated::current->index)
#define blockIdx emulated::block_index
#define blockDim emulated::block_size
#define gridDim emulated::grid_size

namespace emulated {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 1 << 16, kGuard = 64;

enum class State { ready, waits_for_warp, waits_for_block, done };

struct Fiber {
  jmp_buf at;  // where it goes on; unlike swapcontext, a jump does not ask the system
  std::vector<char> stack;
  dim3 index;
  State state;
  alignas(8) char offered[2][8];  // to a shuffle; of two in a row each has its own
  int turn;
};

inline Fiber* current;
inline dim3 block_index, block_size, grid_size;
inline jmp_buf scheduler;
inline std::deque<Fiber> fibers;
inline std::function<void()> body;
inline std::vector<unsigned char> dynamic;

inline unsigned char* shared() {  // 16 bytes aligned
  return dynamic.data() + (16 - reinterpret_cast<uintptr_t>(dynamic.data()) % 16) % 16;
}

inline void wait(State state) {
  current->state = state;
  if (_setjmp(current->at) == 0) _longjmp(scheduler, 1);
}

inline void enter() {  // once a block
  for (;;) {
    body();
    wait(State::done);
  }
}

inline void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (!fiber.stack.empty()) _longjmp(fiber.at, 1);
  fiber.stack.resize(kStack);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.data(), context.uc_stack.ss_size = kStack;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

// Runs a warp until all its threads wait for the block or are done.
inline void run_warp(unsigned from, unsigned to, bool reverse) {
  const auto first = fibers.begin() + from, last = fibers.begin() + to;
  for (;;) {
    for (unsigned k = 0; k < to - from; ++k) {
      Fiber& fiber = fibers[reverse ? to - 1 - k : from + k];
      if (fiber.state == State::ready) resume(fiber);
    }
    const auto waiting = std::count_if(first, last, [](const Fiber& f) { return f.state == State::waits_for_warp; });
    if (waiting == 0) return;
    if (waiting < to - from) throw std::runtime_error("emulated: some lanes of a warp do not reach its barrier or shuffle");
    std::for_each(first, last, [](Fiber& f) { f.state = State::ready; });
  }
}

inline void run_block(bool reverse) {
  const unsigned n = block_size.x, warps = (n + kWarp - 1) / kWarp;
  if (fibers.size() < n) fibers.resize(n);
  for (unsigned t = 0; t < n; ++t) fibers[t].index = dim3(t, 0, 0), fibers[t].state = State::ready, fibers[t].turn = 0;
  for (bool done = false; !done;) {
    for (unsigned k = 0; k < warps; ++k) {
      const unsigned warp = reverse ? warps - 1 - k : k;
      run_warp(warp * kWarp, min(n, (warp + 1) * kWarp), reverse);
    }
    done = true;
    for (unsigned t = 0; t < n; ++t)
      if (fibers[t].state == State::waits_for_block) fibers[t].state = State::ready, done = false;
  }
}

template <typename... P>
struct Launch {
  void (*kernel)(P...);
  dim3 grid, block;
  size_t bytes;

  void operator()(P... arguments) const {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || block.x > 1024 || bytes > 48 << 10)
      throw std::runtime_error("emulated: a GPU would refuse this launch");
    const char* order = std::getenv("MGD_ORDER");
    const bool reverse = order && order[0] == 'r';
    body = [&] { kernel(arguments...); };
    grid_size = grid, block_size = block;
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    for (uint64_t k = 0; k < blocks; ++k) {
      const uint64_t i = reverse ? blocks - 1 - k : k;
      block_index = dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y));
      dynamic.assign(bytes + kGuard, 0xFF);
      run_block(reverse);
      if (std::any_of(shared() + bytes, dynamic.data() + dynamic.size(), [](unsigned char c) { return c != 0xFF; }))
        throw std::runtime_error("emulated: a kernel writes beyond its shared memory");
    }
  }
};

template <typename... P>
Launch<P...> launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t bytes, cudaStream_t) {
  return {kernel, grid, block, bytes};
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::State::waits_for_block); }
inline void __syncwarp() { emulated::wait(emulated::State::waits_for_warp); }

template <typename T>
T __shfl_xor_sync(unsigned, T x, int offset) {
  emulated::Fiber& own = *emulated::current;
  const int turn = own.turn;
  own.turn = 1 - turn;
  std::memcpy(own.offered[turn], &x, sizeof(T));
  __syncwarp();
  const unsigned lane = own.index.x % emulated::kWarp;
  std::memcpy(&x, emulated::fibers[own.index.x - lane + (lane ^ unsigned(offset))].offered[turn], sizeof(T));
  return x;
}
