"""Checks of what pictures of predictions are given: logits of one network, or of several by name."""

import torch
from torch import Tensor

from normkit.checks import by_name, describe

NEXT_STEP = "give what utils.predict(model, test_loader) returns, or its first part, the logits"


def logits_of(data, given, name="logits"):
    """Returns a network's logits, float32 (N, classes) on the CPU, for the test images of data.

    given: what utils.predict returns, or its logits alone, or probabilities, as a tensor or an array.
    """
    logits, labels = given, None
    if isinstance(given, tuple | list) and len(given) == 2 and getattr(given[1], "ndim", 0) == 1:
        logits, labels = given
    elif isinstance(given, tuple) and len(given) == 2 and getattr(given[1], "ndim", 0) == 2:
        logits, labels = given[0], given[1].argmax(1)  # of shares of classes
    if not hasattr(logits, "ndim") or logits.ndim != 2:
        raise TypeError(f"{name} is a {describe(logits)}: expected logits (N, classes); {NEXT_STEP}")
    if len(logits) != len(data.test_labels):
        raise ValueError(
            f"{name} has logits of {len(logits)} images, and {data.name} has {len(data.test_labels)} test images: "
            f"{NEXT_STEP}, over all of them in their order"
        )
    if not len(logits):
        raise ValueError(f"{data.name} has no test images: there is nothing to draw")
    if labels is not None and not torch.equal(torch.as_tensor(labels, device="cpu"), data.test_labels.cpu()):
        raise ValueError(f"{name} was predicted for other labels than {data.name}'s, or in another order: {NEXT_STEP}")
    logits = as_logits(logits)
    if not (finite := logits.softmax(1).isfinite().all(1)).all():
        raise ValueError(
            f"{name} has no finite logits of {int((~finite).sum())} images: there is nothing to draw of them"
        )
    return logits


def as_logits(given):
    """Returns logits (N, classes), float32 on the CPU; of probabilities, which sum to 1, their logarithms.

    Those may have been rounded to two decimals. given: a tensor, an array or a DataFrame.
    """
    given = given.to_numpy() if hasattr(given, "columns") else given
    values = torch.as_tensor(given, device="cpu").detach().float()
    rounding = min(0.5, max(0.02, 0.005 * values.shape[1]))  # of the sum
    are_probabilities = ((values >= 0) & (values <= 1.001)).all() and ((values.sum(1) - 1).abs() <= rounding).all()
    return values.log() if are_probabilities else values


def logits_by_name(data, given):
    """Returns a dict from each variant's name to its logits, as logits_of does.

    given: a dict from a name to what logits_of takes, or for a single network that alone.
    """
    if isinstance(given, Tensor) or hasattr(given, "columns") or not hasattr(given, "items"):
        return {"one network": logits_of(data, given)}
    if not given:
        raise ValueError(f"there are no logits to draw: the dict is empty; {NEXT_STEP}, by name")
    return {name: logits_of(data, each, f"logits[{name!r}]") for name, each in by_name(given).items()}


def class_names(data, *logits):
    """Returns a name for each column of the logits: of the data's classes, of which there may be fewer."""
    columns = max([each.shape[1] for each in logits], default=0)
    names = [str(name) for name in data.classes]
    return names + [f"class {label}" for label in range(len(names), columns)]
