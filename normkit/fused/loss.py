"""Computes a batch's loss and gradients by the kernel alone."""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge

from normkit.fused.legality import reason_against, replaced
from normkit.fused.module import Fused
from normkit.fused.step import TrainingStep

# The functions that the loss stands in for, as imported: they may be replaced later, or have been before.
CALLED = (F, "cross_entropy"), (nn.CrossEntropyLoss, "forward"), (torch.Tensor, "backward")
CALLED = [(owner, name, getattr(owner, name)) for owner, name in CALLED]
IS_ORIGINAL = getattr(getattr(F.cross_entropy, "__code__", None), "co_filename", None) == F.__file__
SETTINGS = vars(nn.CrossEntropyLoss())
KEPT_FOR = 63  # batches, after which changes by a signal handler or another thread are seen
KEPT_NODE = "seen by normkit"
IN_A_LIST = max(map(sys.getrefcount, [object()]))  # the count of an object that only a list refers to


class FusedLoss:
    """Computes a network's cross-entropy, and adds the gradients to the parameters' .grad, without autograd.

    Autograd takes a tenth of a step of 64 images, and a third of one of 2. If it might give another result, or a hook
    or tool observes it, forward returns (None, None) and has no effect.
    undisturbed: only PyTorch's and the kit's code runs between batches. The conditions are then not checked at each
    batch, and results reuse the memory of the batch before the last, which saves two fifths of a step of 2 images, and
    a tenth of one of 64.
    """

    def __init__(self, network, criterion, dtype, undisturbed=False):
        self.network, self.criterion, self.dtype, self.undisturbed = network, criterion, dtype, undisturbed
        self.nodes_kept = isinstance(network, Fused) and are_nodes_kept(network.model)
        self.inspection, self.batches_left = None, 0  # for which it holds
        self.checked = True  # whether the conditions were, for the last batch itself
        self.step = None  # of forward, for backward
        self.spare = []  # steps of the last two batches: .grad holds one's until the next loss has been checked

    def forward(self, images, labels):
        """Returns the mean loss and the number of correct images, for images (N, 3, H, W) and labels int64 (N,).

        Both are scalar tensors; if undisturbed, the batch after the next overwrites them.
        """
        inspection = self.inspect(images, labels)
        if inspection is None:
            return None, None
        call = inspection.prepare_call(self.dtype, True, images.shape, True, torch.get_num_threads())
        step = self.spare.pop(0) if len(self.spare) == 2 else None
        if step is None or not step.is_current(call) or are_held(step.gradients):
            step = TrainingStep(call, inspection.parameters)
        self.step = step
        return step.run(images.float().contiguous(), labels)

    @torch.no_grad()
    def backward(self):
        """Adds the gradients of forward's loss to .grad, and returns whether there was one."""
        if self.step is None:
            return False
        step, self.step = self.step, None
        if self.undisturbed:
            self.spare.append(step)
        for parameter, gradient in zip(self.inspection.parameters, step.gradients):
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)
                self.spare.clear()  # .grad may be one of theirs, and must not be overwritten
        return True

    def inspect(self, images, labels):
        """Returns the network's Inspection, or None where PyTorch has to compute the batch."""
        if not isinstance(self.network, Fused) or self.nodes_kept:
            return None
        self.checked = self.batches_left == 0
        if not self.checked:
            self.batches_left -= 1
            return self.inspection if are_classes(labels, self.inspection.classes) else None
        self.inspection = inspection = self.network.inspect()
        possible = (
            not (inspection.reason or reason_against(images, inspection.frozen))
            and is_plain_step(self.criterion, images, inspection.parameters)
            and are_labels(labels, len(images))
            and labels.is_cpu
            and are_classes(labels, inspection.classes)
        )
        if possible and self.undisturbed:
            self.batches_left = KEPT_FOR
        return inspection if possible else None


def is_plain_step(criterion, images, parameters):
    """Returns whether a step takes cross-entropy and its gradients, and nobody watches autograd do it."""
    return (
        is_cross_entropy(criterion)
        and torch.is_grad_enabled()
        and not (images.requires_grad or torch.is_anomaly_enabled() or torch.is_autocast_enabled(images.device.type))
        and any(each.requires_grad for each in parameters)
        and not any(is_watched(each) for each in parameters)
    )


def is_cross_entropy(criterion):
    """Returns whether a criterion is the plain mean cross-entropy."""
    if not IS_ORIGINAL or any(replaced(CALLED)):
        return False
    return criterion is F.cross_entropy or type(criterion) is nn.CrossEntropyLoss and vars(criterion) == SETTINGS


def is_watched(parameter):
    """Returns whether a hook, a factor or another dtype stands between a parameter's gradient and its .grad."""
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks or not parameter.is_leaf:
        return True
    return getattr(parameter, "grad_dtype", None) not in (None, parameter.dtype)  # older PyTorch has none


def are_nodes_kept(model):
    """Returns whether somebody keeps one of autograd's nodes in which gradients arrive, as for a hook there.

    Autograd itself lets go of them: one that nobody keeps is another node each time it is asked for.
    """
    learning = [each for each in model.parameters() if each.requires_grad and each.is_leaf]
    for each in learning:
        get_gradient_edge(each).node.metadata[KEPT_NODE] = True
    return any(get_gradient_edge(each).node.metadata.pop(KEPT_NODE, False) for each in learning)


def are_held(tensors):
    """Returns whether somebody else has one of the tensors in a list, or a view of one.

    A signal handler or another thread may have; what shares no more than the memory, as .detach() does, is not seen.
    """
    return max(map(sys.getrefcount, tensors)) > IN_A_LIST


def are_labels(labels, N):
    """Returns whether labels are int64 (N,), in a tensor whose memory holds them."""
    return (
        type(labels) is torch.Tensor
        and (labels.dtype, labels.shape, labels.layout) == (torch.int64, (N,), torch.strided)
        and not (labels.is_neg() or labels._is_zerotensor())
    )


def are_classes(labels, classes):
    """Returns whether each of the labels (N,) is a class; on a GPU one waits for that."""
    low, high = labels.aminmax()
    return 0 <= int(low) and int(high) < classes
