"""Marks of the network, of its norms and of functions as they were loaded: another code makes another run."""

import contextlib
import functools
import inspect
import sys
import types
import zlib

import model
from normkit.code import mark_of, mark_of_source, text_of

OWN_NORMS = ("batch", "group", "layer")  # which came with model.py
MARK = 0xE1707C10  # of model.py as it came


def marks_of(norm):
    """Returns marks of a norm and of the network, each "" where it is the kit's."""
    return mark_of_norm(norm), mark_of_network()


def mark_of_norm(norm):
    """Returns a mark of what a user-defined norm is made of: another code makes another run."""
    builder = model.NORMS.get(norm)
    is_own = builder is not None and not (norm in OWN_NORMS and getattr(builder, "__module__", None) == "model")
    return f"#{mark_of(builder)}" if is_own else ""


def mark_of_network():
    """Returns a mark of a network that is not model.py's as it came: one of an edited file, one of replaced parts."""
    made, loaded, mark, _ = as_loaded(id(model.__spec__))
    replaced = {name: each for name, each in parts_of_model(made).items() if loaded.get(name) is not each}
    marks = [f"{mark:08x}"] if mark != MARK else []
    if replaced:
        known = {name: each for name, each in loaded.items() if isinstance(each, type | types.FunctionType)}
        marks.append(mark_of(replaced, known | {"NORMS": model.NORMS}))  # each norm has a mark of its own
    return "".join(f" model#{each}" for each in marks)


@functools.cache
def as_loaded(number):
    """Returns what model.py made when it was loaded, the parts of that, a mark of the file, and its specification.

    The file may be edited, and then say what this process has not loaded: it is read once for each loading. number:
    the id of the specification, which is another for each; held here, it leaves its id to no other.
    """
    made = {name: each for name, each in vars(model).items() if name[:2] != "__" and name != "NORMS"}
    try:
        mark = mark_of_source(inspect.getsource(model), "NORMS", OWN_NORMS)
    except OSError:  # there is no source
        mark = MARK
    return made, parts_of_model(made), mark, model.__spec__


def parts_of_model(made):
    """Returns what model now has under the names that model.py made, and what the classes among them have, by name."""
    parts = {name: vars(model).get(name) for name in made}
    for kind in made.values():
        if getattr(kind, "__module__", None) == "model" and isinstance(kind, type):
            # Without the notes that Python leaves in a class, such as its annotations, when somebody asks for them.
            own = {name: each for name, each in vars(kind).items() if name[:2] != "__" or callable(each)}
            parts |= {f"{kind.__name__}.{name}": each for name, each in own.items()}
    return parts


def code_of(functions):
    """Returns a mark of functions' code, whatever it refers to; those of model.py share a mark of the whole file."""
    texts = []
    for function in functions:
        if function.__module__ == "model":
            with contextlib.suppress(OSError):  # there is no source
                source, _ = source_as_loaded(id(sys.modules["model"].__spec__))
                texts.append(str(mark_of_source(source, "NORMS", ())))
                continue
        consts = [None if each == function.__doc__ else each for each in function.__code__.co_consts]
        texts += text_of(function.__code__.replace(co_consts=tuple(consts)), {})
    return f"{zlib.crc32(' '.join(texts).encode()):08x}"


@functools.cache
def source_as_loaded(number):
    """Returns the source of model.py, or of another that a notebook put in its place, and the specification.

    It is read once for each loading; number: as of as_loaded.
    """
    return inspect.getsource(sys.modules["model"]), sys.modules["model"].__spec__


# Now, for later, when the file may have been edited.
mark_of_network()
code_of([model.Net.forward])
