"""Checks of users' optimizers and schedulers, and access to their hooks and gradients."""

import contextlib
import copy
import inspect
import math
import sys
import warnings
from types import FunctionType

from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def rate_of(group):
    """Returns the learning rate of a parameter group, NaN where it has none."""
    return math.nan if group.get("lr") is None else float(group["lr"])


def set_mode(optimizer, mode):
    """Calls optimizer.train() or optimizer.eval() where there is one: schedule-free optimizers swap weights there."""
    if callable(switch := getattr(optimizer, mode, None)):
        switch()


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


def check_part(name, part, attribute, example):
    """Raises TypeError unless a part is an object with that attribute, and not a class, a list or a number."""
    if isinstance(part, type) or not hasattr(part, attribute):
        given = f"the class {part.__name__}" if isinstance(part, type) else repr(part)
        raise TypeError(f"the {name} is {given}: expected an object such as {example}")


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
    needed = [] if scheduler is None else arguments_needed(scheduler.step)
    if needed:
        raise TypeError(
            f"{type(scheduler).__name__}.step takes {', '.join(needed)}, and is called without: give it a default, or "
            "step the schedule in on_epoch"
        )
    if not is_torch_scheduler(scheduler):
        return
    groups, done, steps = optimizer.param_groups, 0, epochs * (batches if scheduler_step == "batch" else 1)
    with set_back(scheduler, groups):
        try:
            last_epoch = getattr(scheduler, "last_epoch", 0)  # ChainedScheduler has none
            if steps > MAX_STEPS_CHECKED and last_epoch + steps > getattr(scheduler, "total_steps", math.inf):
                raise ValueError(f"it has {scheduler.total_steps} in all, {last_epoch} of them done")
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


def arguments_needed(method):
    """Returns the names of the arguments that a method cannot be called without."""
    parameters = inspect.signature(method).parameters.values()
    by_place = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [each.name for each in parameters if each.default is each.empty and each.kind in by_place]


@contextlib.contextmanager
def set_back(scheduler, groups):
    """Gives a scheduler, and the parameter groups that it steers, their values back; silences what it warns of."""
    state = copy.deepcopy(scheduler.state_dict())
    saved = [{key: copy.deepcopy(value) for key, value in group.items() if key != "params"} for group in groups]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of steps before the optimizer's
            yield
    finally:
        scheduler.load_state_dict(state)
        for group, values in zip(groups, saved):
            for key, value in values.items():
                if isinstance(group[key], Tensor):  # in place: whoever gave it may hold it, too
                    group[key].copy_(value)
                else:
                    group[key] = value


def hooks_of(optimizer):
    """Returns the functions that an optimizer calls at each step, and its parameters when they get their gradients."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    hooks = [each._backward_hooks for each in parameters] + [each._post_accumulate_grad_hooks for each in parameters]
    return [*step_hooks(optimizer), *(hook for each in hooks for hook in (each or {}).values())]


def step_hooks(optimizer):
    """Returns the functions that an optimizer calls before and after each step."""
    hooks = [getattr(optimizer, f"_optimizer_step_{kind}_hooks", {}) for kind in ("pre", "post")]
    return [hook for each in hooks for hook in each.values()]


def gradients_of(optimizer):
    """Returns {"gradients": Gradients} if a user-defined zero_grad may keep them for the next epoch, else {}."""
    return {} if is_known_function(optimizer.zero_grad) else {"gradients": Gradients(optimizer)}


class Gradients:
    """Saves the gradients of an optimizer's parameters, such as those accumulated over batches, by state_dict."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def parameters(self):
        return enumerate(parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def state_dict(self):
        return {f"gradient {i}": each.grad for i, each in self.parameters() if each.grad is not None}

    def load_state_dict(self, state):
        for i, each in self.parameters():
            gradient = state.get(f"gradient {i}")
            each.grad = None if gradient is None else gradient.to(each.device, copy=True)


def run_no_user_code(loader, optimizer, scheduler=None):
    """Returns whether loading a batch and stepping optimizer and scheduler runs no code but PyTorch's and the kit's.

    So none has a user-defined class, method or function, and the optimizer has no hook. loader: a utils.Loader.
    """
    hooks = [*step_hooks(optimizer), *_global_optimizer_pre_hooks, *_global_optimizer_post_hooks]
    return (
        not hooks
        and type(optimizer).__module__.startswith(("torch.optim.", "normkit."))  # other libraries' may wrap a user's
        and all(map(is_known_function, filter(callable, vars(optimizer).values())))
        and (scheduler is None or is_torch_scheduler(scheduler))
        and all(map(has_known_methods, map(type, (loader, optimizer, scheduler))))
    )


# Muon stands on pytorch_optimizer; typing_extensions wraps what is deprecated, as one of Optimizer's methods is.
KNOWN_PACKAGES = {"torch", "normkit", "utils", "pytorch_optimizer", "typing_extensions", *sys.stdlib_module_names}


def has_known_methods(kind):
    """Returns whether nobody has replaced a method of a class of PyTorch's or the kit's, by a function or a mock."""
    attributes = [each for base in kind.__mro__ for each in vars(base).values() if callable(each)]
    others = "abc", "builtins", "collections.abc", "_collections_abc", "typing"  # classes, slots, annotations
    functions = [each for each in attributes if type(each) is FunctionType or type(each).__module__ not in others]
    return all(map(is_known_function, functions))


def is_known_function(function):
    """Returns whether a function and those it wraps, as torch's schedulers wrap step, are PyTorch's or the kit's."""
    while function is not None:
        module = getattr(function, "__globals__", {}).get("__name__", "")  # as wraps() gives away __module__
        if module.partition(".")[0] not in KNOWN_PACKAGES:
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def is_torch_scheduler(scheduler):
    """Returns whether a scheduler is one of torch's, and holds no user-defined functions."""
    inner = getattr(scheduler, "_schedulers", [])
    attributes = getattr(scheduler, "__dict__", {})
    own = [name for name, value in attributes.items() if callable(value) and name != "_scale_fn_ref"]  # CyclicLR's
    own += attributes.get("lr_lambdas", [])
    return type(scheduler).__module__ == lr_scheduler.__name__ and not own and all(map(is_torch_scheduler, inner))
