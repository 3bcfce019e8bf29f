"""Builds the kernel, once a machine: compiler and flags, the cache, and loading."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import platformdirs

from normkit.fused.params import LayerParams

SOURCES = Path(__file__).with_name("csrc")
FUNCTIONS = "layer_params_size", "forward", "backward", "step"
ACTIVATIONS = "float", "bf16"  # C++'s types of them: each has its functions, such as forward_bf16
ASKING, BUILDING = 30, 300  # seconds a compiler is waited for; they take one, and five to ten

# The library brings no OpenMP runtime of its own, it binds to PyTorch's (see csrc/parallel.h): so no -fopenmp, and
# names are left open when it is linked. Optimised for this machine's processor, which the cache's key covers.
# Whatever CXX has of its own: no other results for NaN, and no library that only an instrumented Python can load.
OVERRIDES = ["-O3", "-fno-fast-math", "-fno-sanitize=all"]
COMPILE = ["-std=c++17", *OVERRIDES, "-fno-math-errno", "-fPIC"]
LINK = {"Linux": ["-shared"], "Darwin": ["-dynamiclib", "-undefined", "dynamic_lookup"]}
TARGET = {
    ("Linux", "x86_64"): ["-march=native"],
    ("Linux", "aarch64"): ["-mcpu=native"],
    ("Darwin", "x86_64"): ["-march=native"],
    ("Darwin", "arm64"): ["-mcpu=apple-m1"],  # Apple's clang refuses native; every Apple silicon runs this
}
INSTALL = {  # a package manager -> the command that installs a C++ compiler
    "apt-get": "sudo apt-get install g++",
    "dnf": "sudo dnf install gcc-c++",
    "pacman": "sudo pacman -S gcc",
    "apk": "sudo apk add g++",
    "zypper": "sudo zypper install gcc-c++",
    "xcode-select": "xcode-select --install",
}


class Library(NamedTuple):
    """The kernel's functions, or the reason why there are none; path: where the compiled library lies."""

    functions: ctypes.CDLL | None
    reason: str | None
    path: str = ""


class BuildError(Exception):
    """There is no library, for the reason that it names."""


@functools.cache
def library():
    """Returns the Library for this machine: from the cache, or built now. Asked once a process."""
    try:
        command = compile_command()
        key = cache_key(command)
        folder, against = cache_folder()
        if folder is None:
            return build_for_this_process(command, against)
        for file in folder.glob(f"kernel-{key}-*.so"):
            with contextlib.suppress(OSError, BuildError):  # not this user's alone, damaged, or just replaced
                return load_from_cache(file)
        return build_into_cache(command, folder, key)
    except BuildError as error:
        return Library(None, str(error))
    except OSError as error:  # the kit is in a zip file, or lacks the kernel's sources
        return Library(None, f"the kernel's sources cannot be read: {error}")


def load_from_cache(file):
    """Loads a library; raises BuildError unless it is this user's alone, and its bytes have the hash in its name."""
    if not is_private(file):
        raise BuildError(f"others can write to {file}")
    if file.stem.rpartition("-")[2] != digest(file.read_bytes()):
        raise BuildError(f"{file} is damaged")  # which could crash the process that loads it
    return Library(load(file), None, str(file))


def build_into_cache(command, folder, key):
    """Builds beside the final path and renames; if that fails, builds for this process alone."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as parent:
            built = compile_into(command, Path(parent))
            built.chmod(0o700)
            file = folder / f"kernel-{key}-{digest(built.read_bytes())}.so"
            os.replace(built, file)
        return load_from_cache(file)
    except (OSError, BuildError) as error:  # of a disk that is full, or from which nothing may be run
        return build_for_this_process(command, str(error))


def digest(content):
    return hashlib.sha256(content).hexdigest()[:32]


def build_for_this_process(command, against):
    try:
        with tempfile.TemporaryDirectory(prefix="normkit-", ignore_cleanup_errors=True) as folder:
            built = compile_into(command, Path(folder))
            return Library(load(built), None, f"a temporary folder ({against})")
    except OSError as error:
        raise BuildError(f"the kernel cannot be built: {error}") from None


def compile_command():
    """Returns the command that compiles for this platform, as words."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) not in TARGET:
        known = ", ".join(" ".join(pair) for pair in TARGET)
        raise BuildError(f"there is no fused kernel for {system} {machine}, only for {known}")
    return [*compiler_words(), *COMPILE, *TARGET[system, machine]]


def compiler_words():
    """Returns the compiler, with whatever flags CXX gives it, as words."""
    given = os.environ.get("CXX")
    try:
        compiler = shlex.split(given or "c++")
    except ValueError as error:
        raise BuildError(f"the environment variable CXX is no command, {error}: {given}") from None
    if not compiler or shutil.which(compiler[0]) is None:
        if given:
            raise BuildError(f"the environment variable CXX names no C++ compiler that is there: {given!r}")
        how = next((command for manager, command in INSTALL.items() if shutil.which(manager)), "install g++ or clang++")
        raise BuildError(f"no C++ compiler: {' '.join(compiler)!r} is not there; {how}")
    return compiler


def cache_key(command):
    """Returns a hash of the sources, the flags, and all macros that the compiler defines by itself.

    The macros tell its version and the instructions of the processor it compiles for.
    """
    macros = run_compiler([*command, "-x", "c++", "-dM", "-E", os.devnull], ASKING)
    parts = [" ".join(command).encode(), macros]
    parts += [path.name.encode() + path.read_bytes() for path in sorted(SOURCES.iterdir())]
    return digest(b"\0".join(parts))


def compile_into(command, folder):
    """Compiles for all types of activations at a time, and links, in the folder; returns the library's path."""
    compiled, linked = [str(folder / f"{activation}.o") for activation in ACTIVATIONS], folder / "kernel.so"

    def compile_for(activation, to):
        run_compiler([*command, f"-DACTIVATION={activation}", "-c", str(SOURCES / "kernel.cpp"), "-o", to])

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_for, ACTIVATIONS, compiled))
    run_compiler([*compiler_words(), *OVERRIDES, *LINK[platform.system()], *compiled, "-o", str(linked)])
    return linked


def run_compiler(command, seconds=BUILDING):
    """Returns what the compiler wrote to its output; a failure quotes the last lines of its errors."""
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} was not done after {seconds} seconds: CXX may name another compiler") from None
    except OSError as error:
        raise BuildError(f"the compiler cannot be run: {error}") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        first = [line for line in lines[:-5] if "error" in line][:1]
        said = "".join(f"\n  {line}" for line in first + lines[-5:])
        raise BuildError(f"{command[0]} failed to build the kernel, exit status {done.returncode}{said}")
    return done.stdout


def cache_folder():
    """Returns the folder of compiled kernels, made if need be, or None and the reason why it is not to be used."""
    try:
        folder = Path(platformdirs.user_cache_dir("normkit", appauthor=False))
    except RuntimeError as error:  # of newer platformdirs; older ones give a relative path
        return None, str(error)
    if not folder.is_absolute():
        return None, "there is no home folder"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_private(folder):
            return None, f"{folder} is a link" if folder.is_symlink() else f"others can write to {folder}"
    except OSError as error:
        return None, str(error)
    return folder, None


def is_private(path):
    """Returns whether the path belongs to this user, is no link, and nobody else can write to it."""
    found = path.lstat()
    return found.st_uid == os.geteuid() and not stat.S_ISLNK(found.st_mode) and not found.st_mode & 0o022


def load(path):
    """Loads the library and declares its functions; raises BuildError where its struct is not this version's."""
    if platform.system() == "Linux":
        # PyTorch's wheels for ARM load their libgomp for themselves alone: it is made visible, not loaded again.
        with contextlib.suppress(OSError):
            ctypes.CDLL("libgomp.so.1", mode=os.RTLD_GLOBAL | os.RTLD_NOLOAD)
    try:
        functions = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the compiled kernel cannot be loaded: {error}") from None
    for activation in ACTIVATIONS:
        declare(functions, activation)
    return functions


def declare(functions, activation):
    """Declares the functions for a type of activations; raises BuildError where one is missing or another version's."""
    names = [f"{name}_{activation}" for name in FUNCTIONS]
    for name in names:
        if not hasattr(functions, name):
            raise BuildError(f"the compiled kernel does not export {name}: does CXX have a flag that hides it?")
    params_size, forward, backward, step = (getattr(functions, name) for name in names)
    params_size.restype = ctypes.c_int64
    if params_size() != ctypes.sizeof(LayerParams):
        raise BuildError("the compiled kernel's LayerParams is not the one of params.py")
    layers = [ctypes.c_void_p, ctypes.c_int64]
    forward.argtypes = [*layers, ctypes.c_bool, ctypes.c_int64, ctypes.c_void_p]
    backward.argtypes = [*layers, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    step.argtypes = [*layers, ctypes.c_int64, *[ctypes.c_void_p] * 3]
    forward.restype = backward.restype = step.restype = ctypes.c_int64
