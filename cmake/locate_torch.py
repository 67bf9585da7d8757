"""Print root, version and CUDA version of this Python's torch, without importing it (seconds)."""

import importlib.util
import pathlib
import sys

package = importlib.util.find_spec("torch")
if package is None or package.origin is None:
    sys.exit(1)
root = pathlib.Path(package.origin).parent
spec = importlib.util.spec_from_file_location("torch_version", root / "version.py")
assert spec is not None
assert spec.loader is not None
version = importlib.util.module_from_spec(spec)
spec.loader.exec_module(version)
number = version.__version__.split("+")[0]
print(root.as_posix(), number, version.cuda or "none", sep=";")
