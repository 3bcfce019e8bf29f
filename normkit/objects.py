"""Objects and functions of somebody's own, and their attributes."""

import sys
import types
from pathlib import Path

LIBRARIES = {"builtins", "normkit", "numpy", "torch", "torchvision", "utils"}
STANDARD = sys.stdlib_module_names - {"__main__"}


def is_somebodys(owner):
    """Whether an object is of a class that is neither the kit's nor a library's; whether a function is."""
    if isinstance(owner, types.FunctionType):
        return is_written_here(owner)
    return type(owner).__module__.partition(".")[0] not in LIBRARIES


def is_written_here(owner):
    """Whether a function's code, or that of an object's class, is no installed library's."""
    name = getattr(owner, "__module__", None) or ""
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    installed = {"site-packages", "dist-packages"} & set(Path(file).parts)
    return name.partition(".")[0] not in LIBRARIES | STANDARD and not installed


def attributes_of(owner):
    """Returns an object's attributes by name, those in slots too; a function's variables are among its."""
    slots = [name for kind in type(owner).__mro__ for name in slots_of(kind)]
    found = {name: getattr(owner, name) for name in slots if hasattr(owner, name)} | getattr(owner, "__dict__", {})
    return found | variables_of(owner) if isinstance(owner, types.FunctionType) else found


def slots_of(kind):
    slots = vars(kind).get("__slots__", ())
    return [slots] if isinstance(slots, str) else slots


def variables_of(function):
    """Returns what a function keeps from call to call, by name: defaults, globals that it names, cells around it."""
    found = {name: getattr(function, name) for name in ("__defaults__", "__kwdefaults__")}
    names, variables = names_in(function.__code__), function.__globals__
    found |= {name: variables[name] for name in names if name in variables}
    return found | {name: cell.cell_contents for name, cell in cells_of(function).items()}


def cells_of(function):
    """Returns the cells of the variables around a function by name, but for those that are not there yet."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
    return {name: cell for name, cell in cells.items() if cell != types.CellType()}


def names_in(code):
    """Returns the names that a function's code, and the functions within it, look up."""
    inner = [name for const in code.co_consts if isinstance(const, types.CodeType) for name in names_in(const)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def put(owner, name, value):
    """Sets an attribute, of a frozen dataclass too, or a variable of a function."""
    if isinstance(owner, types.FunctionType) and name in (cells := cells_of(owner)):
        cells[name].cell_contents = value
    elif isinstance(owner, types.FunctionType) and name in owner.__globals__:
        owner.__globals__[name] = value
    elif getattr(owner, name, None) is not value:
        try:
            setattr(owner, name, value)
        except AttributeError:  # of a frozen dataclass
            object.__setattr__(owner, name, value)
