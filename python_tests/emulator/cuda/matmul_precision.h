#pragma once

// torch's setting for products of float32 matrices, as the test wants it.

namespace l2rw::cuda {

inline bool tf32_allowed() { return emulator::settings.tf32; }

}  // namespace l2rw::cuda
