"""The build makes libraries without Python, and says in a sentence what is missing."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import venv

import pytest
import torch

from l2rw_ext import _C
from l2rw_ext.ops import _native
from l2rw_ext.ops._kernels import COMPOSED
from l2rw_ext.ops._operator import OPERATORS
from support.makefile import make
from support.paths import ROOT

# The CMake and Ninja that the build took come before those of the system.
TOOLS = pathlib.Path(sys.executable).parent
CPU, CUDA = _native.libraries()
FOLDER = pathlib.Path(_C.__file__).parent

needs_cuda_library = pytest.mark.skipif(
    not (FOLDER / "_ops_cuda.so").exists(), reason="built without CUDA"
)


def tool(*command: str) -> str:
    assert shutil.which(command[0]), f"{command[0]} is missing: install binutils"
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def dynamic(path: pathlib.Path, tag: str) -> list[str]:
    """The values of one tag of the dynamic section."""
    lines = tool("readelf", "--dynamic", "--wide", str(path)).splitlines()
    return [line.split("[")[1].rstrip("]") for line in lines if f"({tag})" in line]


def undefined(path: pathlib.Path) -> list[str]:
    lines = tool("nm", "--dynamic", "--undefined-only", str(path)).splitlines()
    return [line.split()[-1].split("@")[0] for line in lines]


def operator_libraries() -> list[pathlib.Path]:
    return sorted(FOLDER.glob("_ops*.so"))


@pytest.mark.parametrize("path", operator_libraries(), ids=lambda path: path.name)
def test_operator_libraries_carry_no_python(path: pathlib.Path) -> None:
    assert not [name for name in dynamic(path, "NEEDED") if "python" in name]
    assert not [name for name in undefined(path) if name.startswith(("Py", "_Py"))]


@pytest.mark.parametrize("path", operator_libraries(), ids=lambda path: path.name)
def test_operator_libraries_use_the_stable_abi_alone(path: pathlib.Path) -> None:
    prefixes = ("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch", "_ZNK5torch")
    assert not [name for name in undefined(path) if name.startswith(prefixes)]


@pytest.mark.parametrize("path", operator_libraries(), ids=lambda path: path.name)
def test_libraries_find_torch_beside_the_package(path: pathlib.Path) -> None:
    assert dynamic(path, "RUNPATH") == ["$ORIGIN/../torch/lib"]
    assert "libtorch_cpu.so" in dynamic(path, "NEEDED")


@needs_cuda_library
def test_cuda_library_pulls_in_libtorch() -> None:
    """Its stream and error functions are in libtorch_cuda.so, which libtorch.so brings."""
    needed = dynamic(FOLDER / "_ops_cuda.so", "NEEDED")
    assert "libtorch.so" in needed
    assert not [name for name in needed if name.startswith("libcudart")]


def test_module_holds_no_operator() -> None:
    (path,) = FOLDER.glob("_C.*.so")
    assert not [name for name in dynamic(path, "NEEDED") if "torch" in name]


def test_build_info() -> None:
    info = _C.build_info()
    assert info == _native.BUILD_INFO
    assert set(info) == {
        "version",
        "compiler",
        "torch_version",
        "torch_target",
        "cuda_version",
        "cuda_architectures",
        "instruction_sets",
    }
    assert info["torch_target"] == "2.11"
    assert bool(info["cuda_version"]) == bool(info["cuda_architectures"])
    assert "baseline" in info["instruction_sets"].split()


def test_libraries_record() -> None:
    assert CPU.loaded
    assert CPU.reason == ""
    assert not (CUDA.loaded and CUDA.reason)
    assert not CUDA.loaded or set(OPERATORS) > COMPOSED


# Why the CUDA library is not loaded


def test_cuda_library_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(_native, "_FOLDER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    library = _native.load_cuda()
    assert not library.loaded
    assert "L2RW_CUDA=ON pip install --no-build-isolation ." in library.reason


def test_cuda_library_with_cpu_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "install a CUDA build of torch" in _native.load_cuda().reason


@needs_cuda_library
def test_cuda_library_of_another_major_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "11.8")
    reason = _native.load_cuda().reason
    assert "torch with CUDA 11.8" in reason
    assert "rebuild with nvcc 11" in reason


@needs_cuda_library
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_cuda_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", _native.BUILD_INFO["cuda_version"])
    assert "the dynamic linker refused it" in _native.load_cuda().reason


def test_package_without_its_operators(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(_native, "_FOLDER", tmp_path)
    with pytest.raises(ImportError, match=r"_ops\.so is missing; reinstall it"):
        _native._load_cpu()
    (tmp_path / "_ops.so").write_bytes(b"no library")
    with pytest.raises(ImportError, match=r"needs torch 2\.11 or newer"):
        _native._load_cpu()


# The configure step


def configure(
    folder: pathlib.Path, python: pathlib.Path | str, *options: str, **environment: str
) -> tuple[int, str]:
    command = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(folder),
        "-GNinja",
        f"-DPython_EXECUTABLE={python}",
    ]
    result = subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}", **environment},
        check=False,
    )
    return result.returncode, " ".join(result.stderr.split())


def python_with_torch(folder: pathlib.Path, version: str, cuda: str | None) -> pathlib.Path:
    """A Python whose torch is nothing but its version."""
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "torch").mkdir()
    (packages / "torch" / "__init__.py").touch()
    lines = f"__version__ = {version!r}\ncuda = {cuda!r}\n"
    (packages / "torch" / "version.py").write_text(lines)
    return folder / "bin" / "python"


def test_build_without_torch_says_what_to_type(tmp_path: pathlib.Path) -> None:
    venv.create(tmp_path / "python", with_pip=False)
    status, message = configure(tmp_path / "build", tmp_path / "python" / "bin" / "python")
    assert status != 0
    assert message.count("CMake Error") == 1
    assert (
        "l2rw_ext builds against the torch you use, and this Python has none: type "
        "pip install 'torch>=2.11' scikit-build-core pybind11 cmake ninja && "
        "pip install --no-build-isolation ."
    ) in message


def test_build_without_headers_of_python_says_what_to_install(tmp_path: pathlib.Path) -> None:
    status, message = configure(
        tmp_path, sys.executable, f"-DPython_INCLUDE_DIR={tmp_path / 'missing'}"
    )
    assert status != 0
    assert message.count("CMake Error") == 1
    assert "has no headers, which the compiled module needs: install those of Python 3." in message


def test_build_with_an_old_torch_says_what_to_type(tmp_path: pathlib.Path) -> None:
    python = python_with_torch(tmp_path / "python", "2.9.1+cpu", None)
    status, message = configure(tmp_path / "build", python)
    assert status != 0
    assert (
        "l2rw_ext needs torch 2.11 or newer, and this Python has 2.9.1: type "
        "pip install --upgrade 'torch>=2.11'"
    ) in message


def test_cuda_on_without_a_compiler_is_an_error(tmp_path: pathlib.Path) -> None:
    status, message = configure(
        tmp_path,
        sys.executable,
        "-DCMAKE_CUDA_COMPILER=NOTFOUND",
        L2RW_CUDA="ON",
        L2RW_PREBUILT_CUDA="",
    )
    assert status != 0
    assert "L2RW_CUDA=ON needs nvcc, and none was found" in message


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_auto_builds_cuda_for_a_torch_that_has_it(tmp_path: pathlib.Path, cuda: str | None) -> None:
    """A compiler alone is no reason to build a library that this torch could not load."""
    pybind11 = pytest.importorskip("pybind11", reason="CMake looks for it")
    if cuda is not None and shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    build = tmp_path / "build"
    status, message = configure(
        build,
        python_with_torch(tmp_path / "python", "2.13.0", cuda),
        "-DSKBUILD_PROJECT_VERSION=0",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        L2RW_CUDA="AUTO",
        L2RW_PREBUILT_CUDA="",
    )
    assert status == 0, message
    commands = json.loads((build / "compile_commands.json").read_text())
    sources = [pathlib.Path(command["file"]) for command in commands]
    assert any(source.name == "library.cpp" for source in sources)
    assert any(source.suffix == ".cu" for source in sources) == (cuda is not None)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(
    ("architectures", "built", "code"),
    [
        ("80;90a", "80 90a", {"compute_80,sm_80", "sm_90a"}),
        (
            "release",
            "80 86 89 90a 100 120",
            {"compute_80,sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "compute_120,sm_120"},
        ),
    ],
)
def test_what_the_cuda_library_is_compiled_for(
    tmp_path: pathlib.Path, architectures: str, built: str, code: set[str]
) -> None:
    pybind11 = pytest.importorskip("pybind11", reason="CMake looks for it")
    build = tmp_path / "build"
    status, message = configure(
        build,
        python_with_torch(tmp_path / "python", "2.13.0", "13.0"),
        "-DSKBUILD_PROJECT_VERSION=0",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DL2RW_CUDA_ARCHITECTURES={architectures}",
        L2RW_CUDA="ON",
        L2RW_PREBUILT_CUDA="",
    )
    assert status == 0, message
    assert f'architectures {built}"' in (build / "cuda_build.cpp").read_text()
    commands = json.loads((build / "compile_commands.json").read_text())
    commands = [entry["command"] for entry in commands if entry["file"].endswith(".cu")]
    assert commands
    for command in commands:
        assert set(re.findall(r"code=\[([^\]]*)\]", command)) == code
        assert "-fvisibility=hidden" in command


@needs_cuda_library
def test_cuda_library_says_how_it_was_built() -> None:
    said = re.search(
        rb"l2rw_ext CUDA ([0-9.]+) architectures ([0-9a-z ]+)\0",
        (FOLDER / "_ops_cuda.so").read_bytes(),
    )
    assert said is not None
    assert said[1].decode() == _native.BUILD_INFO["cuda_version"]
    assert said[2].decode() == _native.BUILD_INFO["cuda_architectures"]


def test_prebuilt_cuda_library_is_installed_and_not_built(tmp_path: pathlib.Path) -> None:
    pybind11 = pytest.importorskip("pybind11", reason="CMake looks for it")
    library = tmp_path / "prebuilt.so"
    library.write_bytes(b"\x7fELF\0l2rw_ext CUDA 13.0.88 architectures 90a\0\1\2")
    build = tmp_path / "build"
    status, message = configure(
        build,
        sys.executable,
        "-DSKBUILD_PROJECT_VERSION=0",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        L2RW_CUDA="OFF",
        L2RW_PREBUILT_CUDA=str(library),
    )
    assert status == 0, message
    commands = (build / "compile_commands.json").read_text()
    assert ".cu" not in commands
    assert r"L2RW_CUDA_VERSION=\\\"13.0.88\\\"" in commands
    assert r"L2RW_CUDA_ARCHITECTURES=\\\"90a\\\"" in commands
    installed = (build / "cmake_install.cmake").read_text()
    assert str(library) in installed
    assert 'RENAME "_ops_cuda.so"' in installed


@pytest.mark.parametrize("content", [None, b"\x7fELF of something else"])
def test_prebuilt_cuda_library_of_another_kind_is_an_error(
    tmp_path: pathlib.Path, content: bytes | None
) -> None:
    library = tmp_path / "other.so"
    if content is not None:
        library.write_bytes(content)
    status, message = configure(
        tmp_path / "build",
        sys.executable,
        L2RW_PREBUILT_CUDA=str(library),
    )
    assert status != 0
    assert "other.so is no _ops_cuda.so of this package" in message


def test_unknown_cuda_choice_is_an_error(tmp_path: pathlib.Path) -> None:
    status, message = configure(tmp_path, sys.executable, "-DL2RW_CUDA=YES")
    assert status != 0
    assert "L2RW_CUDA is 'YES'; it must be AUTO, ON or OFF" in message


# What is published


def test_version_is_said_in_one_place() -> None:
    """And the changelog begins with it."""
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert _C.build_info()["version"] == declared[1]
    newest = re.search(r"^## \[(.+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == declared[1]
    sources = [ROOT / "CMakeLists.txt", ROOT / "CITATION.cff", ROOT / "docs" / "conf.py"]
    sources += [*(ROOT / "cmake").iterdir(), *(ROOT / "l2rw_ext").rglob("*.py")]
    assert not [path for path in sources if declared[1] in path.read_text()]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")
def test_sdist_is_the_checkout(tmp_path: pathlib.Path) -> None:
    """All files that git knows or would take, but what only this project's CI and pages read."""
    pytest.importorskip("scikit_build_core", reason="it makes the sdist")
    make = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", make, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = tmp_path.iterdir()
    with tarfile.open(path) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    listed = tool("git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard")
    files = {name for name in listed.split("\0") if (ROOT / name).is_file()}
    left_out = {name for name in files if name.startswith((".ci/", "benchmarks/results/"))}
    assert packed - {"PKG-INFO"} == files - left_out


# The Makefile


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_another_torch_is_installed_where_it_is_asked_for(tmp_path: pathlib.Path) -> None:
    """An environment is installed once, and once more for each change of TORCH_SPEC."""
    folder, log = tmp_path / "venv", tmp_path / "log"
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"  # writes down what it is asked to do
    python.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\n')
    python.chmod(0o755)

    def installed(spec: str) -> list[str]:
        """The installations of torch by ``make``."""
        log.write_text("")
        variables = (f"VENV={folder}", f"PYTHON={sys.executable}", f"TORCH_SPEC={spec}")
        make("-C", str(ROOT), *variables, f"{folder}/.installed")
        return re.findall(r"pip install .*(torch==\S+)", log.read_text())

    assert installed("torch==2.12.0") == ["torch==2.12.0"]
    assert installed("torch==2.12.0") == []
    assert installed("torch==2.13.0") == ["torch==2.13.0"]
    assert installed("torch==2.13.0") == []


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_what_an_example_prints_and_draws_is_recorded_or_its_run_fails(
    tmp_path: pathlib.Path,
) -> None:
    root, programs = tmp_path / "root", tmp_path / "venv" / "bin"
    for folder in (root / "examples", programs):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", root)
    for name in ("pyproject.toml", "CMakeLists.txt"):
        (root / name).touch()
    for name, commands in {
        "python": "",
        "draw": 'echo printed; for name in "$@"; do echo "of $1" > "${name##*/}.svg"; done',
        "fail": "echo half; false",
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{commands}\n")
        (programs / name).chmod(0o755)

    def recorded(**scripts: str) -> dict[str, str]:
        for name, command in scripts.items():
            (root / "examples" / f"{name}.py").write_text(f"{command} examples/{name}.py\n")
        paths = " ".join(f"examples/{name}.py" for name in scripts)
        variables = (f"VENV={tmp_path / 'venv'}", f"EXAMPLES={paths}")
        done = make("-C", str(root), "examples", *variables, check=False)
        texts = (root / "docs" / "assets" / "examples").iterdir()
        return {path.name: path.read_text() for path in texts} | {"error": done.stderr}

    found = recorded(a="    draw", b="    echo")
    assert found.pop("error") == ""
    assert found == {
        "a.txt": "$ draw examples/a.py\nprinted\n",
        "a.svg": "of examples/a.py\n",
        "b.txt": "$ echo examples/b.py\nexamples/b.py\n",
    }
    assert "b.py draws 2 pictures, but one is recorded" in recorded(b="    draw other")["error"]
    assert "b.py does not say how it is run" in recorded(b="python")["error"]
    failed = recorded(b="    fail")
    assert "Error" in failed.pop("error")
    assert failed == found
