"""The experiment around the network: loaders, training, recipes, one whole run."""

import math
import random
import time
from dataclasses import asdict, dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import TensorDataset

import model as networks  # a notebook may have loaded another since
from normkit import checks, optim
from normkit.augment import list_views, shift_and_flip
from normkit.backend import BACKENDS, choose_backend, compute_logits, evaluating, fast_loss, plain_model
from normkit.checkpoint import settings_in
from normkit.cifar10 import MEAN, STD, load_data  # noqa: F401
from normkit.data import check_data
from normkit.device import check_norms, choose_memory_format, choose_precision, get_device, place_of
from normkit.fused import fuse
from normkit.identity import seed_in
from normkit.meter import Meter, count_correct
from normkit.placement import choose_device
from normkit.plots import plot_curves  # noqa: F401
from normkit.progress import progress_bar
from normkit.randomness import check_seed, generators_preserved, seed_everything
from normkit.resume import TrainingState
from normkit.stepper import Stepper
from normkit.tables import results_table  # noqa: F401

# ------------------------------------------------------------------------------------- loaders


class Loader:
    """Yields batches on the device: images float32 (B, 3, H, W), normalised by MEAN and STD, and labels int64 (B,).

    The whole split is moved to the device once, as uint8; batches are cut, augmented and normalised there.
    Shuffling and augmentation depend on (seed, epoch) alone: inspecting a batch changes nothing, and every
    network sees the same batches. A pass that reaches its last batch advances the epoch.
    """

    generator = None  # the attribute of a DataLoader, which has None by default

    def __init__(
        self, images, labels, batch_size=64, shuffle=False, augment=False, device=None, seed=0, drop_last=False
    ):
        checks.check_split("", images, labels)  # uint8, as they are normalised here
        if not len(images):
            raise ValueError("there are no images to load: the split is empty")
        self.device = get_device(device)
        self.images, self.labels = images.to(self.device).contiguous(), labels.to(self.device)
        self.dataset = TensorDataset(self.images, self.labels)
        self.batch_size = checks.whole_number("batch_size", batch_size)
        switches = checks.yes_or_no(shuffle=shuffle, augment=augment, drop_last=drop_last)
        self.shuffle, self.augment, self.drop_last = switches
        self.seed, self.epoch = check_seed(seed), 0
        if not len(self):
            raise ValueError(f"batch_size={batch_size} with drop_last drops all of the {len(images)} images")
        mean, std = (torch.tensor(numbers, dtype=torch.float32, device=self.device) for numbers in (MEAN, STD))
        self.mean, self.scale = mean.view(3, 1, 1) * 255, 1 / (std.view(3, 1, 1) * 255)
        self.views = list_views(*images.shape[2:]).to(self.device)

    def __repr__(self):
        options = ["batch_size", "shuffle", "augment", "seed"] + ["drop_last"] * self.drop_last
        return f"Loader({len(self.labels)} images, {', '.join(f'{name}={getattr(self, name)}' for name in options)})"

    def __len__(self):
        return (math.floor if self.drop_last else math.ceil)(len(self.labels) / self.batch_size)

    def __iter__(self):
        N, B, epoch, left = len(self.labels), self.batch_size, self.epoch, len(self)
        # Drawn on the CPU, once an epoch: equal on every device, and no small transfer per batch.
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {epoch}").getrandbits(63))
        order = torch.randperm(N, generator=generator, device="cpu") if self.shuffle else torch.arange(N, device="cpu")
        views = torch.randint(len(self.views), (N,), generator=generator, device="cpu")
        order, views = (each[: len(self) * B].to(self.device) for each in (order, views))
        # Small batches are gathered several at a time, as many as fit the device's cache.
        some = max(1, (64 if self.device.type == "cpu" else 1024) * 32 * 32 // self.views.shape[1] // B) * B
        try:
            for chosen, seen in zip(order.split(some), views.split(some)) if len(order) else ():
                images, labels = self.images.index_select(0, chosen), self.labels[chosen]
                if self.augment:
                    images = shift_and_flip(images, self.views.index_select(0, seen))
                for pixels, classes in zip(images.split(B), labels.split(B)):
                    left -= 1
                    yield pixels.float().sub_(self.mean).mul_(self.scale), classes
        finally:  # also when the caller breaks at the last batch
            self.epoch += left == 0 and self.epoch == epoch

    def set_epoch(self, epoch):
        """Sets the epoch, from 0, whose order and augmentation the next pass uses, as DistributedSampler's does."""
        self.epoch = checks.whole_number("epoch", epoch, least=0)


def get_loaders(data, batch_size=64, augment=False, device=None, seed=0, drop_last=False):
    """Returns (train_loader, test_loader); the latter never shuffles, augments or drops.

    augment: flip and shift training images. drop_last: drop an incomplete last training batch.
    """
    check_data(data)
    train_loader = Loader(data.train_images, data.train_labels, batch_size, True, augment, device, seed, drop_last)
    return train_loader, Loader(data.test_images, data.test_labels, batch_size, False, False, device, seed)


# ------------------------------------------------------------------------------------ training


def train(
    model, loader, optimizer, scheduler=None, *,
    criterion=F.cross_entropy, precision="auto", backend="auto", progress=True,
):  # fmt: skip
    """Trains for one epoch on the model's device; returns Metrics, each batch measured before its step.

    loader: any iterable of (images, labels) with a length; labels int64 (N,), or class probabilities (N, classes).
    criterion(logits, labels): returns the mean loss of a batch. scheduler, if given, is stepped after each batch.
    backend: "auto", "eager", "fused" or "compile"; see normkit.backend. precision: see run.
    Raises FloatingPointError if a loss is not finite or reaches 1e12.
    """
    network, backend_line = choose_backend(backend, model)
    check_trainable(network, criterion, optimizer, scheduler)
    optim.check_schedule(scheduler, optimizer, "batch", epochs=0, batches=0)
    if progress:
        print(f"Backend: {backend_line}")
    return train_epoch(network, loader, optimizer, scheduler, criterion, precision, progress)


def check_trainable(network, criterion, optimizer, scheduler):
    """Raises unless a network can be trained with these parts, here and now."""
    checks.check_criterion(criterion)
    checks.check_grad_enabled(network)
    optim.check_optimizer(optimizer, network, scheduler)


def train_epoch(network, loader, optimizer, scheduler, criterion, precision, progress):
    """Trains a network that choose_backend has returned; see train."""
    device, dtype, compute_dtype = place_of(network, loader, precision)
    meter = Meter()  # read on a GPU now and then, as when the bar redraws: each read synchronises
    undisturbed = type(loader) is Loader and optim.run_no_user_code(loader, optimizer, scheduler)
    stepper, fast = Stepper(optimizer, undisturbed), fast_loss(network, criterion, compute_dtype, undisturbed)
    network.train()

    def read_metrics():
        meter.read()
        if meter.first_unsound is not None:
            rate = optim.rate_of(optimizer.param_groups[0])
            raise FloatingPointError(checks.unsound_loss(meter, batch_id, rate, plain_model(network), images))
        accuracy = 100 * meter.correct / meter.total
        bar.set_description(f"Train: Loss={meter.loss:.4f} Batch_id={batch_id} Accuracy={accuracy:.2f}", False)

    def backward(loss):
        stepper.zero_grad()
        if not fast.backward():
            loss.backward()
        return loss

    def closure():
        return backward(criterion(compute_logits(network, images, compute_dtype), labels.to(device)))

    with (
        progress_bar(total=checks.length_of(loader), desc="Train", disable=not progress) as bar,
        checks.oom_advice(loader),
    ):
        for batch_id, batch in enumerate(loader):
            images, labels = checks.check_batch(batch)
            images = checks.check_images(images, device, dtype)
            loss, correct = fast.forward(images, labels)
            if fast.checked:
                stepper.forget()  # user code may have run, or does now: a module, a hook, the criterion
            if loss is None:
                logits = compute_logits(network, images, compute_dtype)
                labels = checks.check_labels(labels, logits, batch_id)
                loss = checks.check_loss(criterion(logits, labels), criterion)
                correct = count_correct(logits, labels)
            meter.add(loss, correct, len(labels))
            if meter.first_unsound is not None:  # on a CPU: raise before the step changes the weights
                read_metrics()
            backward(loss)
            stepper.step(loss, closure)
            if scheduler is not None:
                scheduler.step()
            if bar.update():
                read_metrics()
        meter.read()
        if not meter.total:
            raise ValueError("the loader yields no images")
        read_metrics()
    return meter.metrics()


def evaluate(network, loader, precision, take):
    """Calls take(logits, labels) after each batch; the network's mode and weights stay as they are."""
    device, dtype, compute_dtype = place_of(network, loader, precision)
    checks.check_iterable(loader)
    batch_id = None
    with evaluating(network), checks.oom_advice(loader):
        for batch_id, batch in enumerate(loader):
            images, labels = checks.check_batch(batch)
            with torch.no_grad():  # not around the loader: it may need gradients, as for adversarial images
                logits = compute_logits(network, checks.check_images(images, device, dtype), compute_dtype)
                take(logits, checks.check_labels(labels, logits, batch_id))
    if batch_id is None:
        raise ValueError("the loader yields no images")


def predict(model, loader, *, precision="auto", backend="auto"):
    """Returns logits (N, classes) and labels over a loader; weights and mode stay as they are. precision: see run."""
    network, _ = choose_backend(backend, model)
    batches = []
    # Cloned, as CUDA graphs and some loaders write every batch to the same memory.
    evaluate(network, loader, precision, lambda *batch: batches.append([each.clone() for each in batch]))
    return tuple(torch.cat(parts) for parts in zip(*batches))


def test(model, loader, *, criterion=F.cross_entropy, precision="auto", backend="auto"):
    """Returns the model's Metrics in evaluation mode, averaged over images. criterion: see train."""
    checks.check_criterion(criterion)
    network, _ = choose_backend(backend, model)
    return measure(network, loader, criterion, precision)


test.__test__ = False  # not a test of pytest's


def measure(network, loader, criterion, precision):
    """Tests a network that choose_backend has returned; see test."""
    meter = Meter()

    def count(logits, labels):
        loss = checks.check_loss(criterion(logits, labels), criterion, needs_grad=False)
        meter.add(loss, count_correct(logits, labels), len(labels))

    evaluate(network, loader, precision, count)
    return meter.metrics()


class History(list):
    """Lists one row (a dict) per finished epoch. unfinished: the number of an interrupted epoch, or None."""

    unfinished = None


torch.serialization.add_safe_globals([History])  # plain rows, so that torch.load reads them as it reads weights


def fit(
    model, train_loader, test_loader, optimizer, scheduler=None, epochs=20, *, scheduler_step="epoch",
    criterion=F.cross_entropy, precision="auto", backend="auto", progress=True, checkpoint=None, on_epoch=None,
):  # fmt: skip
    """Trains for some epochs and logs each; returns the History.

    scheduler: any of torch's, stepped per epoch, or with scheduler_step="batch", as OneCycleLR needs, per batch;
    ReduceLROnPlateau gets the training loss, or with mode="max" the training accuracy.
    checkpoint: a file, written at the start and after each epoch, its predecessor kept as "….previous". The same call
    resumes from it, with the numbers of an uninterrupted run, weight averages kept by on_epoch included. Without one,
    each call starts at the loader's first epoch, so equal calls see equal batches.
    on_epoch(history): called after each finished epoch, and once with the rows that a checkpoint held.
    KeyboardInterrupt, also from on_epoch, returns the history so far; a loss that is not finite or reaches 1e12 raises
    FloatingPointError. Both restore all state_dicts to the end of the last finished epoch. backend, precision: see run.
    A row holds epoch, lr (at its start), train_loss, train_acc, test_loss, test_acc (percent), seconds.
    """
    epochs = checks.check_epochs(epochs)
    checks.check_choice("scheduler_step", scheduler_step, ["epoch", "batch"])
    checks.check_callback("on_epoch", on_epoch)
    checks.check_loaders(train_loader, test_loader)
    network, backend_line = choose_backend(backend, model)
    check_trainable(network, criterion, optimizer, scheduler)
    log = print if progress else lambda *args, **kwargs: None
    state = TrainingState(plain_model(network), optimizer, scheduler, criterion, train_loader, test_loader, on_epoch)
    history = History()
    saved = state.checkpoint(checkpoint, scheduler_step, precision)
    history[:], source = saved.restore(epochs)
    optim.check_schedule(scheduler, optimizer, scheduler_step, epochs - len(history), len(train_loader))
    log(f"Backend: {backend_line}")
    if source is not None:
        log(f"Going on after epoch {len(history)}, from {source}\n")
    else:
        saved.save(history)  # so that a run stopped in its first epoch restarts from the same state

    def one_epoch(epoch):
        start, lr = time.perf_counter(), optim.rate_of(optimizer.param_groups[0])
        state.set_epoch(epoch - 1)  # regardless of earlier passes over the loader
        for i, group in enumerate(optimizer.param_groups):
            log(f"Adjusting learning rate of group {i} to {optim.rate_of(group):.4e}.")
        log(f"Epoch {epoch}", flush=True)
        check_trainable(network, criterion, optimizer, scheduler)  # which on_epoch may have changed
        per_batch = scheduler if scheduler_step == "batch" else None
        try:
            trained = train_epoch(network, train_loader, optimizer, per_batch, criterion, precision, progress)
            optim.set_mode(optimizer, "eval")
            tested = measure(network, test_loader, criterion, precision)
            if not math.isfinite(tested.loss):
                advice = "the weights may be huge, or the criterion may count no image of a batch"
                raise FloatingPointError(f"the test loss is not finite: {advice}")
        except FloatingPointError as error:
            raise FloatingPointError(f"epoch {epoch}: {error}. The model is as epoch {epoch - 1} left it.") from None
        accuracy = f"{tested.correct}/{tested.total} ({tested.accuracy:.2f}%)"
        log(f"Test set: Average loss: {tested.loss:.4f}, Accuracy: {accuracy}\n", flush=True)
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(trained.accuracy if scheduler.mode == "max" else trained.loss)
        elif scheduler is not None and per_batch is None:
            scheduler.step()
        row = {"epoch": epoch, "lr": lr, "train_loss": trained.loss, "train_acc": trained.accuracy}
        return row | {"test_loss": tested.loss, "test_acc": tested.accuracy, "seconds": time.perf_counter() - start}

    try:
        if source is not None and (differences := saved.call_again(history, on_epoch)):
            log(f"It may differ from an uninterrupted run: {'; '.join(differences)}\n", flush=True)
        for epoch in range(len(history) + 1, epochs + 1):
            with state.undone_on(FloatingPointError, KeyboardInterrupt):
                history.append(one_epoch(epoch))
            saved.finish_epoch(history, on_epoch)
    except KeyboardInterrupt:
        history.unfinished = len(history) + 1 if len(history) < epochs else None
        goes_on = " Run again to go on after the last whole epoch." if checkpoint else ""
        if history.unfinished:
            log(f"\nInterrupted in epoch {history.unfinished}, which is left out.{goes_on}", flush=True)
    finally:
        saved.note_settings()
    return history


# --------------------------------------------------------------------------- recipes and a run


@dataclass(frozen=True)
class Recipe:
    """Holds a run's settings other than norm, seed and epochs; the defaults are the assignment's classic recipe.

    optimizer: "sgd", or "muon", which steps along the nearest orthogonal matrix to each weight's momentum (Jordan et
    al. 2024) and leaves biases and the norms' scales and shifts to AdamW at adamw_lr.
    weight_decay: for weights only, not for biases, scales and shifts.
    schedule: "step" multiplies lr by gamma every step_size epochs; "onecycle" raises it linearly to lr over the
    fraction warmup of all steps, then lowers it linearly to zero.
    num_groups, dropout, skip, head_gain: see model.Net. augment: see get_loaders.
    """

    batch_size: int = 64
    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    adamw_lr: float = 0.003
    schedule: str = "step"
    step_size: int = 7
    gamma: float = 0.1
    warmup: float = 0.2
    dropout: float = 0.01
    num_groups: int | str = 4
    skip: bool = True
    augment: bool = False
    head_gain: float = 3.0

    def __post_init__(self):
        for each in fields(self):  # normalised: 1, 1.0 and NumPy's or torch's 1 give the same text
            value, kind = getattr(self, each.name), type(each.default)
            value = value.item() if getattr(value, "shape", None) == () else value
            if type(value) is int and (kind is float or kind is bool and value in (0, 1)):
                value = kind(value)
            object.__setattr__(self, each.name, value)
        checks.check_choice("optimizer", self.optimizer, ["sgd", "muon"])
        checks.check_choice("schedule", self.schedule, ["step", "onecycle"])
        if repr(self.num_groups) not in map(repr, (1, 2, 4, 8, 16, "channels")):  # repr, as True == 1 and 4.0 == 4
            raise ValueError(f"num_groups={checks.shown(self.num_groups)}: choose 1, 2, 4, 8, 16 or 'channels'")
        for name in ("batch_size", "step_size"):
            checks.whole_number(name, getattr(self, name))
        for name in ("lr", "adamw_lr", "gamma", "head_gain"):
            checks.number_between(name, getattr(self, name), above=0)
        for name in ("momentum", "warmup"):
            checks.number_between(name, getattr(self, name), least=0, below=1)
        checks.number_between("weight_decay", self.weight_decay, least=0)
        checks.number_between("dropout", self.dropout, least=0, most=1)
        checks.yes_or_no(nesterov=self.nesterov, skip=self.skip, augment=self.augment)

    def __str__(self):
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())

    def replace(self, **changes):
        """Returns a copy with the changes that are not None; raises ValueError for an unknown setting."""
        names = [each.name for each in fields(self)]
        for name in changes:
            checks.check_choice("setting", name, names)
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


# "best" was chosen on 5,000 training images held out: results/README.md lists what was tried.
RECIPES = {
    "classic": Recipe(),
    "best": Recipe(
        batch_size=128, optimizer="muon", lr=0.05, momentum=0.95, nesterov=True, weight_decay=0.03, adamw_lr=0.01,
        schedule="onecycle", dropout=0.0, augment=True, head_gain=1.0,
    ),
}  # fmt: skip


def get_recipe(recipe="classic", **changes):
    """Returns a Recipe, or the one of that name in RECIPES, with the changes that are not None."""
    if isinstance(recipe, Recipe):
        return recipe.replace(**changes)
    if type(recipe).__qualname__ == "Recipe":  # of another loading of this module
        return Recipe(**asdict(recipe)).replace(**changes)
    checks.check_choice("recipe", recipe, list(RECIPES))
    return RECIPES[recipe].replace(**changes)


def build_optimizer(model, recipe):
    """Returns the recipe's optimizer for the model's parameters."""
    weights = {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": recipe.weight_decay}
    others = {"params": [p for p in model.parameters() if p.dim() <= 1]}
    settings = {"lr": recipe.lr, "momentum": recipe.momentum, "nesterov": recipe.nesterov}
    if recipe.optimizer == "sgd":
        groups = [weights, others] if recipe.weight_decay else model.parameters()
        fused = next(model.parameters()).device.type in ("cuda", "cpu")
        return torch.optim.SGD(groups, **settings, fused=fused)
    from normkit.muon import Muon  # which takes a second to import

    return Muon([weights | {"use_muon": True} | settings, others | {"use_muon": False, "lr": recipe.adamw_lr}])


def build_scheduler(optimizer, recipe, epochs, batches):
    """Returns the recipe's scheduler, and the interval at which to step it: "epoch" or "batch"."""
    if recipe.schedule == "step":
        return StepLR(optimizer, recipe.step_size, recipe.gamma), "epoch"
    return one_cycle(optimizer, epochs * batches, recipe.warmup), "batch"


def one_cycle(optimizer, steps, warmup):
    """Returns a per-batch schedule that raises each group's rate linearly to its present one, then lowers it to 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    total = steps + 1  # the last rate is zero: it comes one step later, so that no step is lost on it
    # The first phase has to end after a step, or OneCycleLR divides by zero.
    return OneCycleLR(
        optimizer, rates, total, pct_start=max(warmup, 2 / total), anneal_strategy="linear", cycle_momentum=False
    )


@dataclass
class Result:
    """Holds a finished run: its settings, the name of its data, the trained model and its history."""

    norm: str
    seed: int
    model: torch.nn.Module = field(repr=False)
    history: list[dict] = field(repr=False)
    data: str = ""
    recipe: Recipe = field(default=Recipe(), repr=False)


def run(
    norm, data, epochs=20, batch_size=None, seed=0, device=None, *, recipe="classic", precision="auto",
    memory_format="auto", backend="auto", progress=True, checkpoint=None, on_epoch=None, self_check=None, **changes,
):  # fmt: skip
    """Trains a new network, everything built from the seed; returns a Result. fit takes any model and optimizer.

    recipe: a name in RECIPES, or a Recipe; batch_size and changes (lr=0.1, ...) replace its settings.
    device, precision ("float32" or "bfloat16") and memory_format of the modules ("contiguous" or "channels_last") are
    chosen for the machine unless given. backend: see train. checkpoint, on_epoch: see fit.
    self_check: first compare the norms on the device with the CPU's; None does so on Apple's MPS only.
    The returned model is contiguous, and the global random generators are left as they were.
    """
    recipe = get_recipe(recipe, batch_size=batch_size, **changes)
    if seed is None and checkpoint is not None:
        seed = seed_in(settings_in(checkpoint))
    epochs, seed = checks.check_epochs(epochs), check_seed(seed)
    checks.check_choice("backend", backend, BACKENDS)
    with generators_preserved(get_device(device)):
        seed_everything(seed)
        model = networks.Net(norm, recipe.num_groups, recipe.dropout, recipe.skip, recipe.head_gain)
        check_data(data, model.C10.out_channels)
        device, device_line = choose_device(device, model, backend)
        dtype = choose_precision(precision, device)
        model.to(device)
        memory_format = choose_memory_format(memory_format, model, device, dtype)
        if backend in ("eager", "compile") or fuse(model).reason is not None:  # the fused kernel reads either format
            model.to(memory_format=memory_format)
        batch_size = recipe.batch_size
        train_loader, test_loader = get_loaders(data, batch_size, recipe.augment, device, seed)
        test_loader.batch_size = max(batch_size, 64 if device.type == "cpu" else 2000)  # small batches are slow
        if self_check or (self_check is None and device.type == "mps"):
            check_norms(model, (batch_size, len(data.train_labels) % batch_size or batch_size))
        optimizer = build_optimizer(model, recipe)
        scheduler, scheduler_step = build_scheduler(optimizer, recipe, epochs, len(train_loader))
        if progress:
            fused = "fused " if optimizer.defaults.get("fused") else ""
            choices = (device_line, dtype, fused + type(optimizer).__name__)
            print(f"{norm} norm on {data.name}: " + ", ".join(str(choice).removeprefix("torch.") for choice in choices))
        options = {"scheduler_step": scheduler_step, "precision": precision, "backend": backend}
        options |= {"progress": progress, "checkpoint": checkpoint, "on_epoch": on_epoch}
        history = fit(model, train_loader, test_loader, optimizer, scheduler, epochs, **options)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return Result(norm, seed, model, history, data.name, recipe)
