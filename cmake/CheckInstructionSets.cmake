# Fails when an object compiled for one instruction set defines a weak symbol outside its namespace:
# the linker keeps one definition of each, and a machine without the instruction set may call it.
# Arguments: NM, ISA, OBJECTS (separated by |).

string(REPLACE "|" ";" OBJECTS "${OBJECTS}")
execute_process(
  COMMAND "${NM}" --defined-only ${OBJECTS}
  OUTPUT_VARIABLE symbols
  COMMAND_ERROR_IS_FATAL ANY
)
string(REGEX MATCHALL "[0-9a-f]+ [WVu] [^\n]+" weak "${symbols}")
list(FILTER weak EXCLUDE REGEX "${ISA}|DW\\.ref\\.")
if(weak)
  list(JOIN weak "\n" weak)
  message(
    FATAL_ERROR
    "Sources compiled for ${ISA} define symbols that other code may be linked to; "
    "make them always inline, or keep them out of these sources:\n${weak}"
  )
endif()
