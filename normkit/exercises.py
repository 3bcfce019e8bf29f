"""Checks of the notebook's exercises: each prints whether an answer is right, or what is off."""

import functools

import torch
from torch import nn


def exercise(check):
    """Decorates a check, which returns what is wrong with an answer in words, or None if it is right.

    Also reports an error in the answer, and an empty one: ... or None, or a function that returns one of these.
    """

    @functools.wraps(check)
    def wrapper(answer):
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # looking changes no seed
                off = check(filled_in(answer))
        except NothingYet:
            print("Nothing filled in yet.")
        except Exception as error:  # of the student's code
            print(f"Not yet: {type(error).__name__}: {error}")
        else:
            print(f"Not yet: {off}" if off else "Right.")

    return wrapper


class NothingYet(Exception):
    """There is no answer yet."""


def filled_in(answer):
    if answer is ... or answer is None:
        raise NothingYet
    return answer


def activations(N=8, C=16, size=6):
    """Returns activations (N, C, size, size) that are neither centred nor of unit deviation."""
    return 3 * torch.randn(N, C, size, size, generator=torch.Generator().manual_seed(0)) + 2


def difference(actual, expected):
    """Returns how two tensors differ, in words, or None."""
    if not isinstance(actual, torch.Tensor):
        return f"a tensor is expected, this is a {type(actual).__name__}"
    if actual.shape != expected.shape:
        return f"the shape is {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual = actual.to(expected)  # an answer may be computed in float64, or on a GPU
    gap = (actual - expected).abs()
    if not torch.allclose(actual, expected, rtol=1e-3, atol=1e-3):
        return f"the largest difference is {gap.max():.3g}, the mean one {gap.mean():.3g}"
    return None


@exercise
def batch_of_one(name):
    """Which norm batch norm becomes in training when the batch is a single image."""
    name, x = str(name).lower().removesuffix(" norm"), activations(1)
    layers = {"batch": 0, "group": 4, "layer": 1, "instance": 16}
    if name not in layers:
        return f"{name!r} is none of {', '.join(layers)}"
    if name == "batch":
        return "it stays batch norm, but there is a norm that computes the very same"
    other = nn.GroupNorm(layers[name], 16)(x)
    off = difference(nn.BatchNorm2d(16)(x), other)
    return off and f"on one image, batch norm and {name} norm differ: {off}"


@exercise
def fresh_statistics(answer):
    """A function that computes what a new batch norm layer does to x in evaluation mode."""
    x = activations()
    return difference(filled_in(answer(x.clone())), nn.BatchNorm2d(16).eval()(x))


@exercise
def running_mean(answer):
    """The running mean after two training batches of mean 5, by batch norm's defaults."""
    norm = nn.BatchNorm1d(1)
    for _ in range(2):
        norm(torch.tensor([[4.0], [6.0]]))
    expected, given = norm.running_mean.item(), float(answer)
    if abs(given - expected) < 1e-3:
        return None
    once = "; that is after one batch" if abs(given - 0.5) < 1e-3 else ""
    return f"{given:g} is too {'low' if given < expected else 'high'}{once}"


@exercise
def bias_before_the_norm(answer):
    """The gradient of a convolution's bias where batch norm follows."""
    block = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)).double()
    (block(activations(C=3).double()) * activations(size=4).double()).sum().backward()
    largest = block[0].bias.grad.abs().max().item()
    said = f"PyTorch says {largest:.0e}, which is 0 but for rounding. Which step takes the bias away?"
    return None if abs(float(answer) - largest) < 1e-6 else said


@exercise
def instance_norm(answer):
    """A function: instance norm without scale and shift."""
    x = activations()
    return difference(filled_in(answer(x.clone())), nn.InstanceNorm2d(16)(x))


@exercise
def rms_norm(answer):
    """A function: each image's activations divided by the root of their mean square, over channels and pixels."""
    x = activations()
    return difference(filled_in(answer(x.clone())), nn.functional.rms_norm(x, x.shape[1:], eps=1e-5))


@exercise
def fold(answer):
    """A function of a convolution and the batch norm behind it: one convolution that computes both in evaluation."""
    conv, norm = nn.Conv2d(3, 16, 3, padding=1).eval(), nn.BatchNorm2d(16)
    norm.weight.data, norm.bias.data = torch.linspace(0.5, 2, 16), torch.linspace(-1, 1, 16)
    images = activations(C=3)
    norm(conv(images))  # so that there are statistics
    norm.eval()
    expected, before = norm(conv(images)).detach(), conv(images).detach()
    folded = filled_in(answer(conv, norm))
    if not isinstance(folded, nn.Conv2d):
        return f"a Conv2d is expected, this is a {type(folded).__name__}"
    if folded is conv or not torch.equal(conv(images), before):
        return "the convolution that was given has to stay as it is: return a new one"
    return difference(folded(images.to(folded.weight)).detach(), expected)
