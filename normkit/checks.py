"""The errors for bad input: what was given, what is accepted, and the next step."""

import contextlib
import math
import operator
import os
import traceback
from functools import partial

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy


def check_choice(name, value, choices):
    """Raises ValueError unless the value of the setting called name is one of the choices."""
    if getattr(value, "shape", ()) != () or value not in choices:  # of an array == is no answer
        *others, last = map(str, choices)
        either = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"unknown {name} {shown(value)}: choose {either}")


def yes_or_no(**settings):
    """Returns an iterator of the settings' values as bools; raises ValueError unless each equals True or False."""
    for name, value in settings.items():
        check_choice(name, value, [False, True])
    return map(bool, settings.values())


def whole_number(name, value, least=1, most=math.inf):
    """Returns value as an int, from least to most; NumPy's and torch's whole numbers count, True and 1.0 do not."""
    try:
        number = operator.index(value) if not isinstance(value, bool) else None
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name}={shown(value)}: expected a whole number {bounds}")
    return number


def number_between(name, value, *, above=-math.inf, least=-math.inf, below=math.inf, most=math.inf):
    """Raises ValueError unless value is a finite number within the bounds."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (above < value < below and least <= value <= most):
        bounds = (f"above {above:g}", above), (f"of at least {least:g}", least), (f"below {below:g}", below)
        bounds += ((f"of at most {most:g}", most),)
        said = " and ".join(text for text, bound in bounds if math.isfinite(bound))
        raise ValueError(f"{name}={shown(value)}: expected a number {said}")


def check_epochs(epochs, limit=None):
    """Returns epochs as an int; raises unless it is a whole number from 1 to the limit."""
    epochs = whole_number("epochs", epochs)
    if limit is not None and epochs > limit:
        raise ValueError(
            f"epochs={epochs}: the assignment allows {limit}. To lift that, change limit= where this is checked"
        )
    return epochs


def check_folder(name, folder):
    """Raises TypeError unless a folder is given as text or Path."""
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"{name} is {shown(folder)}: expected a folder, as text or Path, such as 'data'")


def describe(value):
    """Returns a value's dtype or type, and its shape if it has one, for error messages."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    shape = getattr(value, "shape", None)
    return type(value).__name__ + (f" {tuple(shape)}" if shape is not None else "")


def shown(value):
    """Returns a value's repr, or describe(value) if that takes more than a line."""
    text = repr(value)
    return describe(value) if "\n" in text or len(text) > 200 else text


def in_words(error, most=None):
    """Returns "Kind: message" of an error in one line, the message cut to `most` characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"


def by_name(given):
    """Returns a dict with its keys as text; a tuple's parts, as groupby gives them, are joined by commas.

    Raises ValueError if two keys, such as 1 and "1", give the same text.
    """
    names = [", ".join(map(str, key)) if isinstance(key, tuple) else str(key) for key in given]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{len(twice)} of the keys read {twice[0]!r} in a picture: give each a name of its own")
    return dict(zip(names, given.values()))


def length_of(loader):
    """Returns a loader's number of batches; raises TypeError unless it can be iterated over and has a length."""
    check_iterable(loader)
    # A user-defined class may begin anew in __iter__; a DataLoader's iterator, which has a length too, does not.
    begins_anew = hasattr(loader, "__len__") and not type(loader).__module__.startswith("torch.")
    if hasattr(loader, "__next__") and not hasattr(loader, "__getitem__") and not begins_anew:
        raise TypeError(f"the loader is a {type(loader).__name__}, used up after one pass: give the DataLoader itself")
    try:
        return len(loader)
    except TypeError:
        dataset = getattr(loader, "dataset", None)
        of = (
            f" of a {type(dataset).__name__}, which has none: give it __len__"
            if dataset is not None
            else (": give a DataLoader, a list of batches, or a class with __len__ and __iter__")
        )
        raise TypeError(f"the loader is a {type(loader).__name__} without a length{of}") from None


def check_loaders(*loaders):
    """Raises ValueError where one of the loaders has no batches."""
    if not all(map(length_of, loaders)):
        raise ValueError("a loader yields no batches: its data set is empty or smaller than one batch")


def check_iterable(loader):
    """Raises TypeError unless a loader can be iterated over."""
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise TypeError(
            f"the loader is a {type(loader).__name__}, which yields no batches: give a DataLoader, a list of "
            "batches, or one of get_loaders(data)"
        )


def check_grad_enabled(model):
    """Raises RuntimeError where gradients are switched off, or were where the model's parameters were made."""
    if not torch.is_grad_enabled():
        raise RuntimeError("gradients are switched off here: call this outside of torch.no_grad() and inference_mode()")
    made = [each for each in model.parameters() if each.requires_grad and not is_lazy(each)]
    if any(each.is_inference() for each in made):
        where = "inside of torch.inference_mode()"
        raise RuntimeError(f"parameters that were made {where} have no gradients: build the model outside of it")


def check_criterion(criterion):
    """Raises TypeError unless a criterion can be called with logits and labels."""
    if isinstance(criterion, type) or not callable(criterion):
        given = f"the class {criterion.__name__}" if isinstance(criterion, type) else shown(criterion)
        raise TypeError(f"the criterion is {given}: expected a function or module, such as nn.CrossEntropyLoss()")


def check_callback(name, function):
    """Raises TypeError unless a callback is callable or None."""
    if function is not None and not callable(function):
        given = shown(function)
        raise TypeError(f"{name} is {given}: expected a function, or None; for several, one that calls them all")


def check_notes(row, columns):
    """Raises ValueError if a row of a history has a key that is one of a table's own columns."""
    taken = [name for name in row if name in columns]
    if taken:
        raise ValueError(f"on_epoch notes {', '.join(taken)}, and the table has that of its own: take another name")


def check_model(model):
    """Raises TypeError unless a model is a torch.nn.Module."""
    if not isinstance(model, torch.nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"the model is {given}: expected a torch.nn.Module, such as model.Net('batch')")


def check_pixels(name, images):
    """Raises ValueError unless images are a tensor uint8 (N, 3, H, W)."""
    shape = getattr(images, "shape", ())
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3:
        raise ValueError(
            f"{name} is {describe(images)}: expected a tensor uint8 (N, 3, H, W), 0 to 255, as "
            "torch.from_numpy(array).permute(0, 3, 1, 2) makes of an array uint8 (N, H, W, 3)"
        )


def check_split(split, images, labels):
    """Raises ValueError unless images are a tensor uint8 (N, 3, H, W), and labels a tensor int64 (N,)."""
    check_pixels(f"{split}images", images)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{split}labels is {describe(labels)}: expected a tensor int64 ({len(images)},), one label an image"
        )


def check_loss(loss, criterion, needs_grad=True):
    """Returns the loss; raises TypeError unless it is a scalar tensor, ValueError if the criterion sums.

    With needs_grad, also raises ValueError if the loss depends on no trained parameter.
    """
    if not isinstance(loss, Tensor) or loss.dim():
        raise TypeError(f"the criterion returns {describe(loss)}: expected one number, the mean loss of the batch")
    given = getattr(criterion, "keywords", {}).get("reduction") or getattr(criterion, "reduction", None)
    if given == "sum":  # "batchmean" is a mean; with "none" a class takes its own
        raise ValueError("the criterion has reduction='sum': expected 'mean', the mean loss of the batch")
    if needs_grad and not loss.requires_grad:
        raise ValueError("the loss does not depend on any parameter that is trained: are all of them frozen?")
    return loss


def check_batch(batch):
    """Returns a loader's batch; raises TypeError unless it is a pair (images, labels)."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        keys = f" of {', '.join(str(key)[:40] for key in batch)}" if isinstance(batch, dict) else ""
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise TypeError(
            f"the loader yields a {type(batch).__name__}{keys or size}: expected a pair (images, labels); "
            "give DataLoader a collate_fn that returns one"
        )
    return batch


def check_images(images, device, dtype):
    """Returns the images on device, in dtype; raises ValueError unless they are floats (N, C, H, W), N at least 1."""
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() != 4 or not len(images):
        message = f"images of {describe(images)}: expected a batch of normalised floats (N, 3, H, W)"
        if isinstance(images, Tensor) and images.dtype == torch.uint8:
            message += (
                ". For uint8 add the transforms v2.ToDtype(torch.float32, scale=True) and v2.Normalize(MEAN, STD), "
                "both from normkit.cifar10"
            )
        raise ValueError(message)
    return images.to(device, dtype)


def check_logits(logits, images):
    """Returns a model's output; raises TypeError unless it is logits (N, classes)."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images) or logits.is_complex():
        raise TypeError(
            f"the model returns {describe(logits)}: expected logits ({len(images)}, classes). "
            "Where it has several outputs, wrap it in a module that returns the main one"
        )
    return logits


def check_labels(labels, logits, batch_id=0):
    """Returns labels on the logits' device; raises ValueError unless they are classes or class probabilities.

    These are int64 (N,), or floats (N, classes) whose rows add up to 1, as MixUp makes them. On a GPU their values are
    checked in the first batch alone, as each check synchronises.
    """
    N, classes = logits.shape
    shares = isinstance(labels, Tensor) and labels.is_floating_point() and labels.shape == logits.shape
    if not shares and (not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (N,)):
        raise ValueError(
            f"the loader yields labels of {describe(labels)}: expected int64 ({N},), one for each image, "
            f"or floats ({N}, {classes}), each image's shares of the classes"
        )
    if labels.device.type == "cpu" or not batch_id:
        low, high = labels.aminmax()
        if shares:
            sums = labels.sum(1)
            if not (low >= 0 and torch.allclose(sums, torch.ones_like(sums), atol=1e-2)):
                advice = "; of two classes, give the network two outputs" if classes == 1 else ""
                raise ValueError(f"labels as shares run from {low:g} to {high:g}: each row has to add up to 1{advice}")
        elif not 0 <= low <= high < classes:
            raise ValueError(
                f"labels run from {low} to {high}: expected 0 to {classes - 1} for the network's {classes} outputs. "
                "Leave images without a class out of the data set; no metric counts them right"
            )
    return labels.to(logits.device)


def unsound_loss(meter, batch_id, rate, model, images):
    """Returns, in words, from which batch on the loss is huge or not finite, and where that is first seen."""
    kind, place = "huge or not finite", f"batch {batch_id}, as it is read now and then"
    if meter.first_unsound == batch_id:  # else a GPU was read too late to find the module
        kind, otherwise = "not finite", "the criterion, which may count no image of the batch"
        if math.isfinite(meter.loss):
            kind, otherwise = "huge", "the loss"
        place = first_non_finite(model, images) or otherwise
    return f"the loss is {kind} from batch {meter.first_unsound} on, at learning rate {rate:g}; first seen in {place}"


def first_non_finite(model, images):
    """Returns, in words, where in the model a value is first not finite, or None, as far as hooks can tell."""
    if not images.isfinite().all():
        return "the images themselves"
    found, otherwise = [], None

    def record(name, module, args, output):
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(name)

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    hooks = []
    try:
        hooks.extend(module.register_forward_hook(partial(record, name)) for name, module in leaves)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # else each hook would be compiled too
            model(images)
    except Exception:  # of a network that takes no hooks, or fails with such weights
        otherwise = "the network"
    finally:
        for hook in hooks:
            hook.remove()
    return f"module {found[0]}" if found else otherwise


@contextlib.contextmanager
def oom_advice(loader):
    """Turns an allocator's error into a MemoryError with advice, and frees the activations."""
    advice = None
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError, and so is the CPU's
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "tried to allocate" not in str(error).lower():  # each platform's says so, and little else
            raise
        size = getattr(loader, "batch_size", None)
        advice = f"out of memory at batch size {size}: try {max(1, size // 2)}" if size else "out of memory: try less"
        traceback.clear_frames(error.__traceback__)  # they hold the activations
    if advice:
        torch.cuda.empty_cache()
        raise MemoryError(advice)
