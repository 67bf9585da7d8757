// _C: what the package asks its own build, and no tensor operator.

#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "How this copy of l2rw_ext was built.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = L2RW_VERSION;
        info["compiler"] = L2RW_COMPILER;
        info["torch_version"] = L2RW_TORCH_VERSION;
        info["torch_target"] = L2RW_TORCH_TARGET;
        info["cuda_version"] = L2RW_CUDA_VERSION;
        info["cuda_architectures"] = L2RW_CUDA_ARCHITECTURES;
        info["instruction_sets"] = L2RW_INSTRUCTION_SETS;
        return info;
      },
      "Version, compiler, torch, CUDA and instruction sets of this build, as text; CUDA fields are "
      "empty where it was built without.");
}
