"""What makes a run that run, as text: settings, code and data, told apart from those of another one."""

import ast
import functools
import io
import itertools
import sys
import tokenize
import types
import zlib

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from normkit.checksum import ADDRESS, crc32_of
from normkit.files import is_plain, plain
from normkit.objects import LIBRARIES
from normkit.randomness import closed_over, objects_of, parts_of

NO_CODE = {"__module__", "__dict__", "__weakref__", "__doc__", "__firstlineno__", "__static_attributes__"}  # of a class


def settings_of(model, optimizer, scheduler, loaders, criterion, scheduler_step, compute_dtype):
    """Returns what identifies a run in its checkpoint, as text by name. loaders: by name."""
    settings = {"model": ADDRESS.sub("", str(model)), "optimizer": plain_lines(optimizer, *optimizer.param_groups)}
    settings["parameter list"] = "\n".join(parameter_lines(model, optimizer))
    if scheduler is not None:
        settings["scheduler"] = plain_lines(scheduler, getattr(scheduler, "state_dict", dict)())
        settings["scheduler_step"] = scheduler_step
    for name, loader in loaders.items():
        has_text = type(loader).__repr__ is not object.__repr__ and not isinstance(loader, list | tuple)
        text = repr(loader) if has_text else type(loader).__name__
        settings[name] = f"{ADDRESS.sub('', text)}, {len(loader)} batches"
    settings["data"] = data_mark(loaders)
    return settings | {"criterion": f"{name_of(criterion)}#{mark_of(criterion)}", "precision": str(compute_dtype)}


def plain_lines(part, *states):
    """Returns the part's type and the plain values of its states, a line each."""
    items = [item for state in states for item in plain(state).items()]
    items = [(key, value.item() if torch.is_tensor(value) and value.numel() == 1 else value) for key, value in items]
    lines = [f"{key}: {value}" for key, value in items if is_plain(value)]
    return "\n".join([type(part).__name__, *lines])


def parameter_lines(model, optimizer):
    """Yields a line for each parameter of the optimizer, in its order, then for those of the model that it lacks."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [(f"group {i}", group["params"]) for i, group in enumerate(optimizer.param_groups)]
    held = {id(parameter) for _, parameters in groups for parameter in parameters}
    groups.append(("no group", [parameter for parameter in model.parameters() if id(parameter) not in held]))
    for group, parameters in groups:
        for parameter in parameters:
            name, frozen = names.get(id(parameter), "another's"), "" if parameter.requires_grad else ", frozen"
            shape = "lazy" if is_lazy(parameter) else tuple(parameter.shape)
            yield f"{name} {shape}{frozen}, in {group}"


def name_of(value):
    """Returns the name of a function or class, or of what an object is an instance of."""
    return getattr(value, "__name__", type(value).__name__)


def data_mark(loaders):
    """Returns a checksum of the arrays and the lists of numbers in what loaders hold, and in their data sets."""
    checksum, seen = 0, set()
    for where, owner in objects_of(**loaders):
        if ".dataset" in where or where.partition("[")[0] in loaders:
            if isinstance(owner, list) and all(isinstance(each, bool | int | float) for each in owner):
                checksum = zlib.crc32(repr(owner).encode(), checksum)
            for _, part in parts_of(owner):
                if isinstance(part, torch.Tensor | np.ndarray) and id(part) not in seen:
                    seen.add(id(part))  # a loader and its data set may hold the same images
                    checksum = crc32_of(part, checksum)
    return f"CRC-32 {checksum:08x}"


def mark_of(value):
    """Returns a mark of what a function, a class or an object is made of, the same in every process."""
    return f"{zlib.crc32(' '.join(text_of(value, set())).encode()):08x}"


@functools.cache
def mark_of_source(source, table, entries):
    """Returns a checksum of a module's code, of the dict called table only these entries; any Python gives the same."""
    texts = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets) == table and isinstance(node.value, ast.Dict):
            items = zip(node.value.keys, node.value.values)
            parts = [part for item in items if getattr(item[0], "value", None) in entries for part in item]
        else:
            parts = [*getattr(node, "decorator_list", []), node]
        texts += [ast.get_source_segment(source, part) for part in parts]
    return zlib.crc32("".join(words_of("\n".join(texts))).encode())


def words_of(code):
    """Yields the words of a code, without comments, docstrings and the spaces between."""
    blocks = {tokenize.INDENT: "{", tokenize.DEDENT: "}"}
    tokens, last = list(tokenize.generate_tokens(io.StringIO(code + "\n").readline)), tokenize.NEWLINE
    for token, following in itertools.pairwise(tokens):
        begins, ends = last in (tokenize.NEWLINE, tokenize.INDENT), following.type == tokenize.NEWLINE
        docstring = token.type == tokenize.STRING and begins and ends
        if not docstring and token.type not in (tokenize.COMMENT, tokenize.NL):
            yield blocks.get(token.type, token.string)
            last = token.type


def text_of(value, seen):
    """Yields what a value is made of, and not where it was written: code, the values it refers to, attributes."""
    if isinstance(value, functools.partial):
        yield from text_of([value.func, value.args, value.keywords], seen)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from text_of(each, seen)
    elif isinstance(value, dict):
        yield from text_of(list(value.items()), seen)
    elif isinstance(value, set | frozenset):
        yield from sorted(map(repr, value))
    elif isinstance(value, torch.Tensor | np.ndarray):
        yield f"{crc32_of(value):08x}"
    elif isinstance(value, types.CodeType):
        yield from (value.co_code.hex(), repr(value.co_names))
        yield from text_of(value.co_consts, seen)
    elif isinstance(value, types.ModuleType) or is_librarys(value):
        yield f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else name_of(value)
    elif id(value) in seen:
        yield "again"
    elif isinstance(value, types.FunctionType):
        seen.add(id(value))
        yield from text_of([value.__code__, value.__defaults__, closed_over(value)], seen)
        yield from text_of(value.__kwdefaults__ or (), seen)
        names = [name for name in names_in(value.__code__) if name in value.__globals__]
        yield from text_of([value.__globals__[name] for name in names], seen)
    elif isinstance(value, types.MethodType):
        yield from text_of([value.__func__, value.__self__], seen)
    elif isinstance(value, type):
        seen.add(id(value))
        own = {name: each for name, each in vars(value).items() if name not in NO_CODE}
        yield from text_of([value.__qualname__, value.__bases__, own], seen)
    elif hasattr(value, "__dict__"):
        seen.add(id(value))
        yield from text_of([type(value), vars(value)], seen)
    else:
        yield ADDRESS.sub("", repr(value))


def names_in(code):
    """Returns the names that a function's code, and the functions within it, look up."""
    inner = [name for const in code.co_consts if isinstance(const, types.CodeType) for name in names_in(const)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def is_librarys(value):
    """Whether a function or class comes from a library, whose name tells it apart."""
    if not isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return False
    module = (getattr(value, "__module__", None) or "").partition(".")[0]
    return module in LIBRARIES or module in sys.stdlib_module_names - {"__main__"}
