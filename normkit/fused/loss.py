"""The loss of a batch and its gradients, by the kernel alone."""

import operator

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import optimizer as torch_optimizer

from normkit.fused.build import library
from normkit.fused.function import backward_pass, forward_pass, layouts_of
from normkit.fused.legality import reason_against
from normkit.fused.module import Fused

CROSS_ENTROPY = F.cross_entropy
# Modules of optimizers that keep no gradient after step(): its memory is written again for the next batch.
OPTIMIZERS = "torch.optim.", "normkit.muon"


class FusedLoss:
    """Computes a network's cross-entropy, and fills the parameters' .grad, with nothing left to autograd.

    Autograd and memory for new gradients take a tenth of a step of 64 images, and a third of one of 2. Where the result
    might be another one than PyTorch's, forward returns None, None and has left the weights alone. That holds for the
    first batch, in which the parameters get their .grad.
    """

    def __init__(self, network, optimizer, criterion, dtype):
        self.network, self.optimizer, self.dtype = network, optimizer, dtype
        self.possible = isinstance(network, Fused) and is_cross_entropy(criterion) and keeps_no_gradient(optimizer)
        self.began, self.gradients, self.saved = False, [], None

    def forward(self, images, labels):
        """Returns logits (N, K) and the mean loss of images (N, 3, H, W) and labels, int64 (N,)."""
        inspection = self.inspect(images, labels)
        if inspection is None:
            return None, None
        call = inspection.prepare_call(self.dtype, True, images.shape, True, torch.get_num_threads())
        logits, *saved = forward_pass(call, images.float().contiguous(), inspection.parameters)
        dlogits, loss = torch.empty_like(logits), torch.empty((), dtype=torch.float32, device="cpu")
        addresses = [each.data_ptr() for each in (logits, labels.contiguous(), dlogits, loss)]
        if not library().functions.cross_entropy(*logits.shape[:2], *addresses):
            return None, None  # a label is no class
        self.saved = call.plan, *saved, dlogits
        return logits.flatten(1), loss

    @torch.no_grad()
    def backward(self):
        """Writes the gradients of forward's loss over .grad, and returns whether there was one."""
        saved, self.saved = self.saved, None
        if saved is not None:
            plan, structs, activations, _, dlogits = saved
            backward_pass(plan, structs, activations, self.gradients, dlogits)
        return saved is not None

    def inspect(self, images, labels):
        """Returns the network's Inspection, or None where PyTorch has to compute the batch."""
        if not self.possible or not self.began:
            self.began = True
            return None
        inspection = self.network.inspect()
        possible = (
            not (inspection.reason or reason_against(images, inspection.frozen))
            and torch.is_grad_enabled()
            and not (images.requires_grad or torch.is_anomaly_enabled() or torch.is_autocast_enabled("cpu"))
            and type(labels) is torch.Tensor
            and (labels.dtype, labels.device.type, labels.shape) == (torch.int64, "cpu", images.shape[:1])
            and not has_hooks(self.optimizer)
            and not any(each._backward_hooks or each._post_accumulate_grad_hooks for each in inspection.parameters)
            and self.find_gradients(inspection.parameters)
        )
        return inspection if possible else None

    def find_gradients(self, parameters):
        """Whether each parameter is trained, and has a .grad of its own layout."""
        gradients = [parameter.grad if parameter.requires_grad else None for parameter in parameters]
        if any(gradient is None for gradient in gradients):
            return False
        if len(self.gradients) != len(gradients) or not all(map(operator.is_, gradients, self.gradients)):
            if [layout[1:] for layout in layouts_of(gradients)] != [layout[1:] for layout in layouts_of(parameters)]:
                return False
            self.gradients = gradients
        return True


def is_cross_entropy(criterion):
    """Whether a criterion is the plain mean cross-entropy."""
    if type(criterion) is nn.CrossEntropyLoss:
        return vars(criterion) == vars(nn.CrossEntropyLoss())
    return criterion is CROSS_ENTROPY


def keeps_no_gradient(optimizer):
    """Whether an optimizer is known to keep no gradient after step()."""
    return type(optimizer).__module__.startswith(OPTIMIZERS) and "zero_grad" not in vars(optimizer)


def has_hooks(optimizer):
    """Whether anybody but a scheduler of PyTorch's watches the optimizer's steps."""
    step = vars(optimizer).get("step")
    return (
        step is not None
        and getattr(step, "__wrapped__", None) is not type(optimizer).step
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )
