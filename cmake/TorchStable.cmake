# LibTorch's stable ABI, from the torch of the Python that runs this build.
#
# find_package(Torch) is not used: with CUDA builds of torch it demands a CUDA toolkit even for CPU
# libraries, and it rewrites the list of CUDA architectures.

# The oldest torch the binaries load into.
set(L2RW_TORCH_TARGET "2.11")
string(REPLACE "." ";" _target "${L2RW_TORCH_TARGET}")
list(GET _target 0 _target_major)
list(GET _target 1 _target_minor)
math(
  EXPR
  _target_value
  "(${_target_major} << 56) | (${_target_minor} << 48)"
  OUTPUT_FORMAT HEXADECIMAL
)

execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/locate_torch.py"
  OUTPUT_VARIABLE _torch
  OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE _torch_missing
)
if(_torch_missing)
  message(
    FATAL_ERROR
    "l2rw_ext builds against the torch you use, and this Python has none: type\n"
    "  pip install 'torch>=${L2RW_TORCH_TARGET}' scikit-build-core pybind11 cmake ninja && pip install --no-build-isolation .\n"
  )
endif()
list(GET _torch 0 L2RW_TORCH_ROOT)
list(GET _torch 1 L2RW_TORCH_VERSION)
list(GET _torch 2 L2RW_TORCH_CUDA)
if(L2RW_TORCH_VERSION VERSION_LESS L2RW_TORCH_TARGET)
  message(
    FATAL_ERROR
    "l2rw_ext needs torch ${L2RW_TORCH_TARGET} or newer, and this Python has ${L2RW_TORCH_VERSION}: type\n"
    "  pip install --upgrade 'torch>=${L2RW_TORCH_TARGET}'\n"
  )
endif()
message(STATUS "torch ${L2RW_TORCH_VERSION} at ${L2RW_TORCH_ROOT}")

add_library(l2rw_torch INTERFACE)
target_include_directories(l2rw_torch SYSTEM INTERFACE "${L2RW_TORCH_ROOT}/include")
target_compile_definitions(l2rw_torch INTERFACE "TORCH_TARGET_VERSION=${_target_value}ULL")
target_link_directories(l2rw_torch INTERFACE "${L2RW_TORCH_ROOT}/lib")
target_link_libraries(l2rw_torch INTERFACE torch_cpu)

function(l2rw_set_warnings target)
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra>")
  if(L2RW_WERROR)
    target_compile_options(
      ${target}
      PRIVATE
        "$<$<COMPILE_LANGUAGE:CXX>:-Werror>"
        "$<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings;-Xcompiler=-Wall,-Wextra,-Werror>"
    )
  endif()
endfunction()

# Contracted products and loops marked `omp simd` may be vectorised; no other reordering is allowed,
# so that a sum is the same from run to run and NaN stays NaN.
function(l2rw_set_optimization target)
  target_compile_options(
    ${target}
    PRIVATE
      "$<$<COMPILE_LANGUAGE:CXX>:-O3;-fopenmp-simd;-ffp-contract=fast;-fno-math-errno;-fno-trapping-math>"
  )
endfunction()

# A Python-free library of operators, installed into the package.
function(l2rw_add_operator_library target)
  add_library(${target} MODULE ${ARGN})
  set_target_properties(${target} PROPERTIES PREFIX "")
  target_include_directories(${target} PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
  target_link_libraries(${target} PRIVATE l2rw_torch)
  l2rw_set_optimization(${target})
  l2rw_set_warnings(${target})
  install(TARGETS ${target} LIBRARY DESTINATION l2rw_ext)
endfunction()
