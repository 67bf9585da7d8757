#pragma once

// How work is shared out among threads.

#include <algorithm>
#include <cstdint>

namespace l2rw {

// How many pieces of so many numbers a thread takes at least.
inline int64_t grain_of(int64_t numbers) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, numbers));
}

}  // namespace l2rw
