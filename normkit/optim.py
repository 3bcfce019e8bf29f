"""What the loop has to know of optimizers and schedulers that are not its own."""

import copy
import inspect
import math
import sys
import warnings
from types import FunctionType

import torch
from torch import Tensor, empty_like
from torch.optim import LBFGS, SGD, lr_scheduler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from normkit.fused.loss import KEPT_FOR


def needs_closure(optimizer):
    """Whether step() evaluates the loss by itself, as LBFGS does, or once more, as SAM's (first_step) does."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    required = closure is not None and closure.default is inspect.Parameter.empty
    return required or closure is not None and hasattr(optimizer, "first_step")


def closure_for(optimizer, loss, closure):
    """Returns the closure for a step. LBFGS first asks for the loss at the weights as they are, which is known."""
    known = [loss] if isinstance(optimizer, LBFGS) else []
    return lambda: known.pop() if known else closure()


def rate_of(group):
    """Returns the learning rate of a parameter group, NaN where it has none."""
    return math.nan if group.get("lr") is None else float(group["lr"])


def set_mode(optimizer, mode):
    """Calls optimizer.train() or optimizer.eval() where there is one: schedule-free optimizers swap weights there."""
    if callable(switch := getattr(optimizer, mode, None)):
        switch()


SMALL = 4096  # numbers in a tensor, on average; two threads were faster than one from 16 to 32 thousand on
SGD_SETTINGS = "lr momentum dampening weight_decay nesterov maximize".split()


class Stepper:
    """Makes an optimizer ready for a loop, and takes its steps, in the fastest of the ways to the same numbers.

    undisturbed: between two steps runs no code but PyTorch's and the kit's, but where forget() is called. Then a small
    fused SGD's tensors are looked up now and then: its step() spends half of its time on that.
    """

    def __init__(self, optimizer, undisturbed=False):
        self.optimizer, self.closure_needed = optimizer, needs_closure(optimizer)
        self.alone = not self.closure_needed and steps_alone(optimizer)
        scaled = hasattr(optimizer, "grad_scale") or hasattr(optimizer, "found_inf")  # by a GradScaler
        self.keeps_tensors = undisturbed and self.alone and type(optimizer) is SGD and not scaled
        self.groups, self.steps_left = [], 0  # SGD's, each with its parameters and their momenta; for how long
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
                    self.groups, self.steps_left = groups_of(self.optimizer), KEPT_FOR
        finally:
            if self.alone:
                torch.set_num_threads(threads)

    def knows_tensors(self):
        """Whether SGD's own methods need not be called. A profile is to show them."""
        return bool(self.groups) and self.steps_left > 0 and not torch.autograd._profiler_enabled()

    @torch.no_grad()
    def step_groups(self):
        """Takes a step of SGD, if its tensors are known, and returns whether it has."""
        if not self.knows_tensors():
            return False
        self.steps_left -= 1
        # All are looked at before one is changed.
        gradients = [[parameter.grad for parameter in parameters] for _, parameters, _ in self.groups]
        settings = [{name: group[name] for name in SGD_SETTINGS} for group, _, _ in self.groups]
        if any(each is None for group in gradients for each in group) or not all(each["momentum"] for each in settings):
            return False
        for (_, parameters, momenta), own, how in zip(self.groups, gradients, settings):
            torch._fused_sgd_(parameters, own, momenta, is_first_step=False, **how)
        return True


def groups_of(optimizer):
    """Returns SGD's groups, each with its parameters and their momenta, or [] where one has none."""
    groups = [
        (group, group["params"], [optimizer.state.get(each, {}).get("momentum_buffer") for each in group["params"]])
        for group in optimizer.param_groups
        if group["params"]
    ]
    return [] if any(each is None for _, _, momenta in groups for each in momenta) else groups


def steps_alone(optimizer):
    """Whether one thread steps faster than several: on a CPU, where they meet at each of a fused optimizer's tensors.

    They add up nothing, so that the numbers are the same.
    """
    groups = optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    return (
        all(group.get("fused") for group in groups)
        and all(parameter.is_cpu for parameter in parameters)
        and sum(parameter.numel() for parameter in parameters) < SMALL * len(parameters)
    )


def are_plain(loader, optimizer, scheduler=None):
    """Whether loading a batch and stepping both runs no code but PyTorch's and the kit's.

    That is, none has a class, a method or a function of a user's, nor the optimizer a hook. loader: one of the kit's.
    """
    hooks = [*step_hooks(optimizer), *_global_optimizer_pre_hooks, *_global_optimizer_post_hooks]
    return (
        not hooks
        and type(optimizer).__module__.startswith(("torch.optim.", "normkit."))  # others may wrap one of the user's
        and all(map(is_plain_function, filter(callable, vars(optimizer).values())))
        and (scheduler is None or is_torch_scheduler(scheduler))
        and all(map(is_plain_class, map(type, (loader, optimizer, scheduler))))
    )


# Muon stands on pytorch_optimizer; typing_extensions wraps what is deprecated, as one of Optimizer's methods is.
PLAIN = {"torch", "normkit", "utils", "pytorch_optimizer", "typing_extensions", *sys.stdlib_module_names}


def is_plain_class(kind):
    """Whether nobody has replaced a method of a class of PyTorch's or the kit's, by a function or a mock."""
    attributes = [each for base in kind.__mro__ for each in vars(base).values() if callable(each)]
    others = "abc", "builtins", "collections.abc", "_collections_abc", "typing"  # classes, slots, annotations
    functions = [each for each in attributes if type(each) is FunctionType or type(each).__module__ not in others]
    return all(map(is_plain_function, functions))


def is_plain_function(function):
    """Whether a function and those that it wraps, as torch's schedulers wrap step, are PyTorch's or the kit's."""
    while function is not None:
        module = getattr(function, "__globals__", {}).get("__name__", "")  # as wraps() gives away __module__
        if module.partition(".")[0] not in PLAIN:
            return False
        function = getattr(function, "__wrapped__", None)
    return True


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


def check_optimizer(optimizer, model, scheduler=None):
    """Raises where one of them is not what its name says, or was built for another model or optimizer."""
    check_part("optimizer", optimizer, "param_groups", "torch.optim.SGD(model.parameters(), 0.01)")
    if scheduler is not None:
        check_part("scheduler", scheduler, "step", "StepLR(optimizer, 7); epochs come after it")
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = [p for p in model.parameters() if p.requires_grad]
    if own and not any(id(p) in trained for p in own):
        raise ValueError(
            "the optimizer holds none of the model's parameters: build it from model.parameters(), after the model"
        )
    steered = getattr(scheduler, "optimizer", None) or optimizer
    if not any(id(p) in trained for group in steered.param_groups for p in group["params"]):
        raise ValueError("the scheduler was built for another optimizer: build it from the one that is given")


def step_hooks(optimizer):
    """Returns the functions that an optimizer calls before and after each step."""
    hooks = [getattr(optimizer, f"_optimizer_step_{kind}_hooks", {}) for kind in ("pre", "post")]
    return [hook for each in hooks for hook in each.values()]


def hooks_of(optimizer):
    """Returns the functions that an optimizer calls at each step, and its parameters when they get their gradients."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    hooks = [each._backward_hooks for each in parameters] + [each._post_accumulate_grad_hooks for each in parameters]
    return [*step_hooks(optimizer), *(hook for each in hooks for hook in (each or {}).values())]


def check_part(name, part, attribute, example):
    """Raises TypeError unless a part is an object with that attribute, and not a class, a list or a number."""
    if isinstance(part, type) or not hasattr(part, attribute):
        given = f"the class {part.__name__}" if isinstance(part, type) else repr(part)
        raise TypeError(f"the {name} is {given}: expected an object such as {example}")


def is_torch_scheduler(scheduler):
    """Whether a scheduler is one of torch's, and holds no user-defined functions."""
    inner = getattr(scheduler, "_schedulers", [])
    attributes = getattr(scheduler, "__dict__", {})
    own = [name for name, value in attributes.items() if callable(value) and name != "_scale_fn_ref"]  # CyclicLR's
    own += attributes.get("lr_lambdas", [])
    return type(scheduler).__module__ == lr_scheduler.__name__ and not own and all(map(is_torch_scheduler, inner))


MAX_STEPS_CHECKED = 20_000  # that are gone through in advance: a second or less


def check_schedule(scheduler, optimizer, scheduler_step, epochs, batches):
    """Raises ValueError where the scheduler would fail on the way, or set a negative or infinite learning rate.

    Goes through the steps of torch's own schedulers once and sets them back: torch accepts StepLR(step_size=0), say,
    and fails at the first step. Schedulers with user-defined functions or objects are left alone.
    """
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        if scheduler_step == "batch":
            raise ValueError(
                "ReduceLROnPlateau waits for an epoch's metrics: choose scheduler_step='epoch' in fit; after train, "
                "step it with what that returns"
            )
        return
    needed = [
        name
        for name, each in (inspect.signature(scheduler.step).parameters if scheduler is not None else {}).items()
        if each.default is each.empty and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    if needed:
        raise TypeError(
            f"{type(scheduler).__name__}.step takes {', '.join(needed)}, and is called without: give it a default, or "
            "step the schedule in on_epoch"
        )
    if not is_torch_scheduler(scheduler):
        return
    steps = epochs * (batches if scheduler_step == "batch" else 1)
    state, groups = copy.deepcopy(scheduler.state_dict()), optimizer.param_groups
    saved = [{key: copy.deepcopy(value) for key, value in group.items() if key != "params"} for group in groups]
    done = 0
    try:
        last_epoch = getattr(scheduler, "last_epoch", 0)  # ChainedScheduler has none
        if steps > MAX_STEPS_CHECKED and last_epoch + steps > getattr(scheduler, "total_steps", math.inf):
            raise ValueError(f"it has {scheduler.total_steps} in all, {last_epoch} of them done")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of steps before the optimizer's
            while done < min(steps, MAX_STEPS_CHECKED):
                done += 1
                scheduler.step()
                rates = [rate_of(group) for group in groups]
                if not all(0 <= rate < math.inf for rate in rates):
                    raise ValueError(f"the learning rate becomes {rates}")
    except Exception as error:  # each scheduler fails in its own way
        raise ValueError(
            f"{type(scheduler).__name__} fails at step {done} of the {steps} it is to take, one after each "
            f"{scheduler_step}: {type(error).__name__}: {error}"
        ) from error
    finally:
        scheduler.load_state_dict(state)
        for group, values in zip(groups, saved):
            for key, value in values.items():
                if isinstance(group[key], Tensor):  # in place: whoever gave it may hold it, too
                    group[key].copy_(value)
                else:
                    group[key] = value
