"""User-defined objects and functions, and their attributes."""

import dis
import functools
import inspect
import sys
import types
from pathlib import Path

OF_GLOBALS = {"LOAD_GLOBAL", "STORE_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}  # the last two in class bodies
LIBRARIES = {"builtins", "normkit", "numpy", "torch", "torchvision", "utils"}


def is_foreign(owner):
    """Returns whether an object's class is none of Python's builtins, torch's, torchvision's, NumPy's or the kit's.

    Of a function or class: whether it is user code.
    """
    if isinstance(owner, types.FunctionType | type):
        return is_user_code(owner)
    return type(owner).__module__.partition(".")[0] not in LIBRARIES


def is_user_code(owner):
    """Returns whether the user defined a function, or an object's class: in a notebook, script or file of theirs."""
    return not is_library(getattr(owner, "__module__", None) or "")


def is_library(name):
    """Returns whether a module belongs to Python, to the kit or to a package that was installed."""
    root = name.partition(".")[0]
    if root in ("__main__", "__mp_main__"):  # a notebook or script, whichever program it runs in
        return False
    if root in LIBRARIES or root in sys.stdlib_module_names:
        return True
    return is_installed(getattr(sys.modules.get(name), "__file__", None) or "")


@functools.cache
def is_installed(file):
    """Returns whether a module's file lies where packages are installed."""
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def is_stateful(owner):
    """Returns whether an object, which is no class, has both state_dict and load_state_dict."""
    return has(owner, "state_dict") and has(owner, "load_state_dict") and not isinstance(owner, type)


def has(owner, name):
    """Returns whether an object has an attribute, without asking it.

    A mock, or what hands on or looks up any name, has not.
    """
    return inspect.getattr_static(owner, name, None) is not None


def attributes_of(owner):
    """Returns an object's attributes by name, those in slots too; also what functions keep from call to call."""
    if isinstance(owner, types.FunctionType):
        return variables_of(owner)
    if isinstance(owner, functools.partial):
        return {name: getattr(owner, name) for name in ("func", "args", "keywords")}
    if isinstance(owner, type):
        return {name: each for name, each in vars(owner).items() if name[:2] != "__" and not hasattr(each, "__get__")}
    slots = [name for kind in type(owner).__mro__ for name in slots_of(kind)]
    return {name: getattr(owner, name) for name in slots if hasattr(owner, name)} | getattr(owner, "__dict__", {})


def slots_of(kind):
    """Returns the names of a class's slots, private ones as Python mangles them."""
    slots, own = vars(kind).get("__slots__", ()), kind.__name__.lstrip("_")
    slots = [slots] if isinstance(slots, str) else slots
    return [f"_{own}{name}" if name[:2] == "__" and name[-2:] != "__" else name for name in slots]


def variables_of(function):
    """Returns a function's defaults and attributes, and the variables around it: globals that it names, cells."""
    found = {name: getattr(function, name) for name in ("__defaults__", "__kwdefaults__", "__dict__")}
    variables = function.__globals__
    found |= {name: variables[name] for name in globals_in(function.__code__) if name in variables}
    return found | closed_over(function)


def closed_over(function):
    """Returns the values that a function has from around it by name, but for those that are not there yet."""
    return {name: cell.cell_contents for name, cell in cells_of(function).items()}


def cells_of(function):
    """Returns the cells of the variables around a function by name, but for those that are not there yet."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
    return {name: cell for name, cell in cells.items() if cell != types.CellType()}


@functools.cache
def globals_in(code):
    """Returns the names of globals in a function's code, and in that of the functions within it."""
    found = [each for part in codes_in(code) for each in dis.get_instructions(part) if each.opname in OF_GLOBALS]
    return list(dict.fromkeys(each.argval for each in found if each.argval[:2] != "__"))


def codes_in(code):
    """Yields a function's code, and that of the functions within it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from codes_in(const)


def put(owner, name, value):
    """Sets what attributes_of gives under a name, in a frozen dataclass too."""
    if isinstance(owner, types.FunctionType) and name in (cells := cells_of(owner)):
        cells[name].cell_contents = value
    elif isinstance(owner, types.FunctionType) and name in globals_in(owner.__code__):
        owner.__globals__[name] = value
    elif isinstance(owner, functools.partial):
        parts = attributes_of(owner) | {name: value}
        owner.__setstate__((*parts.values(), vars(owner)))
    elif getattr(owner, name, None) is not value:
        try:
            setattr(owner, name, value)
        except AttributeError:  # of a frozen dataclass
            object.__setattr__(owner, name, value)
