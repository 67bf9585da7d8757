# Inner loops compiled once per instruction set, chosen at run time (csrc/cpu/isa.h, which has the
# same names).
#
# l2rw_add_isa_object(TARGET SOURCE...) compiles every SOURCE once per name in L2RW_INSTRUCTION_SETS,
# with L2RW_ISA defined to that name, and links the objects into TARGET. A source puts everything it
# defines into `namespace l2rw::L2RW_ISA`.

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(L2RW_INSTRUCTION_SETS baseline avx2 avx512)
else()
  set(L2RW_INSTRUCTION_SETS baseline)
endif()
set(_isa_flags_baseline "")
set(_isa_flags_avx2 -mavx2 -mfma -mf16c)
set(
  _isa_flags_avx512
  -mavx512f
  -mavx512bw
  -mavx512dq
  -mavx512vl
  -mavx2
  -mfma
  -mf16c
  -mprefer-vector-width=512
)

function(l2rw_add_isa_object target)
  foreach(isa IN LISTS L2RW_INSTRUCTION_SETS)
    set(object ${target}_${isa})
    add_library(${object} OBJECT ${ARGN})
    target_include_directories(${object} PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
    target_link_libraries(${object} PRIVATE l2rw_torch)
    target_compile_definitions(${object} PRIVATE L2RW_ISA=${isa})
    l2rw_set_optimization(${object})
    target_compile_options(${object} PRIVATE ${_isa_flags_${isa}})
    l2rw_set_warnings(${object})
    target_link_libraries(${target} PRIVATE ${object})
    if(NOT isa STREQUAL "baseline")
      add_custom_command(
        TARGET ${target}
        PRE_LINK
        COMMAND
          ${CMAKE_COMMAND} "-DNM=${CMAKE_NM}" -DISA=${isa}
          "-DOBJECTS=$<JOIN:$<TARGET_OBJECTS:${object}>,|>" -P
          "${PROJECT_SOURCE_DIR}/cmake/CheckInstructionSets.cmake"
        VERBATIM
      )
    endif()
  endforeach()
endfunction()
