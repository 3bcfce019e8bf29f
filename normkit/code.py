"""Marks of code, and of objects by what they are made of: the same in every process, and wherever it was written."""

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

from normkit.checksum import ADDRESS, crc32_of
from normkit.objects import attributes_of, closed_over, codes_in, globals_in, is_library, is_user_code

STANDARD = sys.stdlib_module_names - {"argparse", "collections", "configparser", "functools", "types"}
PARTS = ("__func__", "fget", "fset", "fdel", "func", "__wrapped__")  # of methods of a class, properties, caches
NO_CODE = {"__module__", "__dict__", "__weakref__", "__doc__", "__firstlineno__", "__static_attributes__"}  # of a class


def mark_of(value, known=None):
    """Returns a mark of what a function, a class or an object is made of, the same in every process.

    known: values by name, which this tells where the value refers to them.
    """
    told = {id(each): name for name, each in (known or {}).items()}
    return f"{zlib.crc32(' '.join(text_of(value, told)).encode()):08x}"


@functools.cache
def mark_of_source(source, table, entries):
    """Returns a checksum of a module's code, the same in any Python; of the dict called table, of these entries."""
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
    blocks, last = {tokenize.INDENT: "{", tokenize.DEDENT: "}"}, tokenize.NEWLINE
    for token, following in itertools.pairwise(tokens_of(code + "\n")):
        begins, ends = last in (tokenize.NEWLINE, tokenize.INDENT), following.type == tokenize.NEWLINE
        docstring = token.type == tokenize.STRING and begins and ends
        if not docstring and token.type not in (tokenize.COMMENT, tokenize.NL):
            yield blocks.get(token.type, token.string)
            last = token.type


def tokens_of(code):
    """Yields Python's tokens, an f-string as one: from Python 3.12 on it has many, some without their spaces."""
    lines, opened = io.StringIO(code).readlines(), []
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        kind = tokenize.tok_name[token.type]
        if kind in ("FSTRING_START", "TSTRING_START"):
            opened.append(token.start)
        elif kind in ("FSTRING_END", "TSTRING_END"):
            (first, column), (last, end) = opened.pop(), token.end
            text = "".join([*lines[first - 1 : last - 1], lines[last - 1][:end]])[column:]
            token = token._replace(type=tokenize.STRING, string=text)
        if not opened:
            yield token


def text_of(value, told):
    """Yields what a value is made of, and not where it was written: code, the values it refers to, attributes.

    told: by id, what to yield in place of values that are known or were told before; these are added.
    """
    if id(value) in told:
        yield told[id(value)]
    elif isinstance(value, functools.partial):
        yield from text_of([value.func, value.args, value.keywords], told)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from text_of(each, told)
    elif isinstance(value, dict):
        yield from text_of(list(value.items()), told)
    elif isinstance(value, set | frozenset):
        yield from text_of(sorted(value, key=lambda each: ADDRESS.sub("", repr(each))), told)
    elif isinstance(value, torch.Tensor | np.ndarray):
        yield f"{crc32_of(value):08x}"
    elif isinstance(value, types.CodeType):
        yield from (value.co_code.hex(), repr(value.co_names))
        yield from text_of(value.co_consts, told)
    elif isinstance(value, types.ModuleType) or is_from_library(value) and value.__name__ != "<lambda>":
        yield f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else value.__name__
    elif isinstance(value, types.FunctionType):
        told[id(value)] = "again"
        closed, named = closed_over(value).values(), named_in(value).values()
        yield from text_of([value.__code__, value.__defaults__, *closed, value.__kwdefaults__ or (), *named], told)
    elif isinstance(value, types.MethodType):
        yield from text_of([value.__func__, value.__self__], told)
    elif isinstance(value, staticmethod | classmethod | property):
        yield from text_of([type(value), parts_of(value)], told)
    elif isinstance(value, type):
        told[id(value)] = "again"
        own = {name: each for name, each in vars(value).items() if name not in NO_CODE}
        yield from text_of([value.__qualname__, value.__bases__, own], told)
    elif hasattr(value, "__dict__") or is_user_code(type(value)):
        told[id(value)] = "again"
        closed = type(value).__module__.partition(".")[0] in STANDARD  # a logger holds all loggers of the process
        yield from text_of([type(value), {} if closed else attributes_of(value)], told)
    else:
        yield ADDRESS.sub("", repr(value))


def named_in(function):
    """Returns the globals that a function names, and what it names of modules that are the user's, by name."""
    code, around = function.__code__, function.__globals__
    names = dict.fromkeys(name for part in codes_in(code) for name in part.co_names)  # of attributes, too
    found = {name: around[name] for name in names if name in around and name in globals_in(code)}
    waiting, seen = [*found.values(), *closed_over(function).values()], set()
    for module in waiting:  # and those that are named of one
        if isinstance(module, types.ModuleType) and not is_library(module.__name__) and module.__name__ not in seen:
            seen.add(module.__name__)
            named = {f"{module.__name__}.{name}": vars(module)[name] for name in names if name in vars(module)}
            found |= named
            waiting += named.values()
    return found


def is_from_library(value):
    """Returns whether a function or class comes from a library, whose name tells it apart."""
    return isinstance(value, type | types.FunctionType | types.BuiltinFunctionType) and not is_user_code(value)


def functions_of(kind):
    """Returns the functions of a class and its bases, except those of a library."""
    owners = [each for each in kind.__mro__ if is_user_code(each)]
    values = [value for owner in owners for _, value in sorted(vars(owner).items()) if hasattr(type(value), "__get__")]
    found = [each for value in values for each in (value, *parts_of(value))]
    return [each for each in found if isinstance(each, types.FunctionType) and is_user_code(each)]


def parts_of(member):
    """Returns the functions that a class's method, property or cache is made of, and None for those that it lacks."""
    return [getattr(member, part, None) for part in PARTS]


def used_by(functions):
    """Returns what functions use beside their arguments: variables around them, globals and defaults, by name."""
    found = {}
    for function in functions:
        found |= closed_over(function) | named_in(function)
        found |= dict(enumerate(function.__defaults__ or ())) | (function.__kwdefaults__ or {})
    return {f"'s {name}": each for name, each in found.items()}
