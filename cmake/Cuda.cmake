# L2RW_CUDA=AUTO|ON|OFF decides whether _ops_cuda.so is built: AUTO builds it where nvcc is found and
# the torch in use has CUDA. Whether this machine has a GPU plays no part.
# L2RW_PREBUILT_CUDA=path/to/_ops_cuda.so, which comes before all of these, installs a
# library that was built before, in place of building one.

if(NOT DEFINED L2RW_CUDA)
  set(L2RW_CUDA "AUTO")
  if(DEFINED ENV{L2RW_CUDA})
    set(L2RW_CUDA "$ENV{L2RW_CUDA}")
  endif()
endif()
if(NOT L2RW_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "L2RW_CUDA is '${L2RW_CUDA}'; it must be AUTO, ON or OFF.")
endif()

if(NOT DEFINED L2RW_PREBUILT_CUDA)
  set(L2RW_PREBUILT_CUDA "$ENV{L2RW_PREBUILT_CUDA}")
endif()

# Machine code of every generation, and PTX of the oldest and of the newest, which a driver
# translates for devices between and after them. The code of 100 runs on 103 as well, that of 120 on
# 121; nothing takes an instruction that only 100a has.
if(L2RW_CUDA_ARCHITECTURES STREQUAL "release")
  set(
    L2RW_CUDA_ARCHITECTURES
    80
    86-real
    89-real
    90a-real
    100-real
    120
  )
endif()

set(L2RW_WITH_CUDA OFF)
if(L2RW_PREBUILT_CUDA)
  # What the library says of itself; see l2rw_configure_cuda_library.
  set(_says "l2rw_ext CUDA ([0-9.]+) architectures ([0-9a-z ]+)")
  if(EXISTS "${L2RW_PREBUILT_CUDA}" AND NOT IS_DIRECTORY "${L2RW_PREBUILT_CUDA}")
    file(STRINGS "${L2RW_PREBUILT_CUDA}" _said REGEX "${_says}" LIMIT_COUNT 1)
  endif()
  if(NOT "${_said}" MATCHES "${_says}")
    message(
      FATAL_ERROR
      "L2RW_PREBUILT_CUDA=${L2RW_PREBUILT_CUDA} is no _ops_cuda.so of this package."
    )
  endif()
  set(L2RW_CUDA_VERSION "${CMAKE_MATCH_1}")
  set(L2RW_CUDA_ARCHITECTURES_BUILT "${CMAKE_MATCH_2}")
elseif(
  L2RW_CUDA STREQUAL "ON"
  OR (L2RW_CUDA STREQUAL "AUTO" AND NOT L2RW_TORCH_CUDA STREQUAL "none")
)
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(L2RW_WITH_CUDA ON)
  elseif(L2RW_CUDA STREQUAL "ON")
    message(
      FATAL_ERROR
      "L2RW_CUDA=ON needs nvcc, and none was found: put it on PATH, set CUDACXX to it, or choose L2RW_CUDA=OFF."
    )
  endif()
endif()

if(L2RW_WITH_CUDA)
  # PTX of 90a runs on nothing else, so that beside its machine code it is of no use.
  string(
    REGEX REPLACE "([0-9][af])(;|$)"
    "\\1-real\\2"
    CMAKE_CUDA_ARCHITECTURES
    "${L2RW_CUDA_ARCHITECTURES}"
  )
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  enable_language(CUDA)
  set(L2RW_CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
  string(
    REGEX REPLACE "-(real|virtual)"
    ""
    L2RW_CUDA_ARCHITECTURES_BUILT
    "${L2RW_CUDA_ARCHITECTURES}"
  )
  string(REPLACE ";" " " L2RW_CUDA_ARCHITECTURES_BUILT "${L2RW_CUDA_ARCHITECTURES_BUILT}")
  string(REGEX MATCH "^[0-9]+" _nvcc_major "${L2RW_CUDA_VERSION}")
  if(NOT L2RW_TORCH_CUDA STREQUAL "none" AND NOT L2RW_TORCH_CUDA MATCHES "^${_nvcc_major}\\.")
    message(
      WARNING
      "nvcc is ${L2RW_CUDA_VERSION} and this torch is built for CUDA ${L2RW_TORCH_CUDA}: _ops_cuda.so will not be loaded with it."
    )
  endif()
  message(STATUS "CUDA ${L2RW_CUDA_VERSION}, architectures ${L2RW_CUDA_ARCHITECTURES_BUILT}")
elseif(L2RW_PREBUILT_CUDA)
  message(
    STATUS
    "${L2RW_PREBUILT_CUDA}: CUDA ${L2RW_CUDA_VERSION}, architectures ${L2RW_CUDA_ARCHITECTURES_BUILT}"
  )
else()
  set(L2RW_CUDA_VERSION "")
  set(L2RW_CUDA_ARCHITECTURES_BUILT "")
  message(
    STATUS
    "CUDA operators are not built (L2RW_CUDA=${L2RW_CUDA}, torch's CUDA: ${L2RW_TORCH_CUDA})"
  )
endif()

function(l2rw_configure_cuda_library target)
  configure_file(
    "${PROJECT_SOURCE_DIR}/cmake/cuda_build.cpp.in"
    "${PROJECT_BINARY_DIR}/cuda_build.cpp"
    @ONLY
  )
  target_sources(${target} PRIVATE "${PROJECT_BINARY_DIR}/cuda_build.cpp")
  set_target_properties(${target} PROPERTIES CUDA_RUNTIME_LIBRARY Static)
  target_compile_definitions(${target} PRIVATE USE_CUDA)
  if(L2RW_CUDA_ARCHITECTURES MATCHES "(^|;)90a(-real|-virtual)?(;|$)")
    target_compile_definitions(${target} PRIVATE L2RW_SM90A)
  endif()
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>")
  # libtorch.so pulls libtorch_cuda.so into scope, where the stream and error functions of the shim
  # are. Nothing refers to libtorch.so itself, so a default link would drop it.
  target_link_options(${target} PRIVATE "LINKER:--no-as-needed")
  target_link_libraries(${target} PRIVATE torch)
endfunction()
