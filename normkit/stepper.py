"""Steps any optimizer: with a closure if it needs one, else by the fastest path."""

import inspect

import torch
from torch import Tensor, empty_like
from torch.optim import LBFGS, SGD

from normkit.optim import set_mode

SMALL = 4096  # numbers in a tensor, on average; two threads were faster than one from 16 to 32 thousand on
SGD_SETTINGS = "lr momentum dampening weight_decay nesterov maximize".split()


class Stepper:
    """Prepares an optimizer for training, and takes its steps by the fastest path that gives the same numbers.

    undisturbed: forget() is called wherever code other than PyTorch's and the kit's may have run since the last step.
    The tensors of a small fused SGD are then kept from step to step: to look them up takes half the time of step().
    """

    def __init__(self, optimizer, undisturbed=False):
        self.optimizer, self.closure_needed = optimizer, needs_closure(optimizer)
        self.alone = not self.closure_needed and steps_alone(optimizer)
        scaled = hasattr(optimizer, "grad_scale") or hasattr(optimizer, "found_inf")  # by a GradScaler
        self.keeps_tensors = undisturbed and self.alone and type(optimizer) is SGD and not scaled
        self.groups = []  # SGD's, each with its parameters and their momenta
        begin(optimizer)

    def forget(self):
        """Has the next step look everything up."""
        self.groups = []

    def zero_grad(self):
        """Lets go of all gradients."""
        if not self.knows_tensors():
            self.optimizer.zero_grad()
            return
        for _, parameters, _ in self.groups:
            for parameter in parameters:
                parameter.grad = None

    def step(self, loss, closure):
        """Takes a step. closure() computes the batch's loss anew, and the gradients; the first time it is known."""
        if self.closure_needed:
            self.optimizer.step(closure_for(self.optimizer, loss, closure))
            return
        threads = torch.get_num_threads()
        if self.alone:
            torch.set_num_threads(1)
        try:
            if not self.step_groups():
                self.optimizer.step()
                if self.keeps_tensors:
                    self.groups = groups_of(self.optimizer)
        finally:
            if self.alone:
                torch.set_num_threads(threads)

    def knows_tensors(self):
        """Returns whether SGD's own methods need not be called. A profile is to show them."""
        return bool(self.groups) and not torch.autograd._profiler_enabled()

    @torch.no_grad()
    def step_groups(self):
        """Takes a step of SGD, if its tensors are known, and returns whether it has."""
        if not self.knows_tensors():
            return False
        # All are looked at before one is changed.
        gradients = [[parameter.grad for parameter in parameters] for _, parameters, _ in self.groups]
        settings = [{name: group[name] for name in SGD_SETTINGS} for group, _, _ in self.groups]
        if any(each is None for group in gradients for each in group) or not all(each["momentum"] for each in settings):
            return False
        for (_, parameters, momenta), own, how in zip(self.groups, gradients, settings):
            torch._fused_sgd_(parameters, own, momenta, is_first_step=False, **how)
        return True


def needs_closure(optimizer):
    """Returns whether step() evaluates the loss by itself, as LBFGS does, or once more, as SAM's (first_step) does."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    required = closure is not None and closure.default is inspect.Parameter.empty
    return required or closure is not None and hasattr(optimizer, "first_step")


def closure_for(optimizer, loss, closure):
    """Returns the closure for a step. LBFGS first asks for the loss at the weights as they are, which is known."""
    known = [loss] if isinstance(optimizer, LBFGS) else []
    return lambda: known.pop() if known else closure()


def steps_alone(optimizer):
    """Returns whether one thread steps faster than several: on a CPU, with a fused optimizer of small tensors.

    Each tensor costs several threads a barrier. A step has no sums over elements, so their number does not change its
    results.
    """
    groups = optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    return (
        all(group.get("fused") for group in groups)
        and all(parameter.is_cpu for parameter in parameters)
        and sum(parameter.numel() for parameter in parameters) < SMALL * len(parameters)
    )


def groups_of(optimizer):
    """Returns SGD's groups, each with its parameters and their momenta, or [] where one has none."""
    groups = [
        (group, group["params"], [optimizer.state.get(each, {}).get("momentum_buffer") for each in group["params"]])
        for group in optimizer.param_groups
        if group["params"]
    ]
    return [] if any(each is None for _, _, momenta in groups for each in momenta) else groups


def begin(optimizer):
    """Makes an optimizer ready for training: in that mode, and with its state where it looks for it."""
    set_mode(optimizer, "train")
    for group in optimizer.param_groups:
        if group.get("fused"):
            for parameter in group["params"]:
                match_strides(getattr(optimizer, "state", {}).get(parameter, {}), parameter)


def match_strides(state, parameter):
    """Gives tensors of the parameter's shape its strides, too: fused optimizers take both as they lie in memory.

    A checkpoint may be of another memory format, and so may a model since to(memory_format=...).
    """
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
            state[name] = empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
