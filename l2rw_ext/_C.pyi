"""How this copy of l2rw_ext was built."""

def build_info() -> dict[str, str]:
    """Version, compiler, torch, CUDA and instruction sets of this build, as text."""
