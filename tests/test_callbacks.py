"""What on_epoch and an optimizer's hooks keep for themselves: averaged weights, schedules, counters; no pictures."""

import copy
import functools
import secrets
import types
from unittest.mock import Mock

import pytest
import torch
from helpers import fit, linear, same
from matplotlib import pyplot as plt
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset, WeightedRandomSampler
from torchvision.transforms import v2

import utils
from normkit import attributes


class Shadow:
    """An average of the weights as many projects copy it: no module, no state_dict, changed through .data."""

    def __init__(self, net):
        self.net, self.calls = net, 0
        self.shadow = {name: value.detach().clone() for name, value in net.named_parameters()}

    def __call__(self, *_):
        self.calls += 1
        for name, value in self.net.named_parameters():
            self.shadow[name].data.mul_(0.9).add_(value.data, alpha=0.1)


class Averaged(nn.Module):
    """An average of the weights that is a module, with a counter that no state_dict has."""

    def __init__(self, net):
        super().__init__()
        self.module, self.nets, self.calls = copy.deepcopy(net), [net], 0

    @torch.no_grad()
    def __call__(self, *_):
        self.calls += 1
        for average, value in zip(self.module.parameters(), self.nets[0].parameters()):
            average.lerp_(value, 1 / (self.calls + 1))


class Best:
    """The best weights so far."""

    def __init__(self, net):
        self.net, self.least, self.state = net, float("inf"), {}

    def note(self, history):
        if history[-1]["test_loss"] < self.least:
            self.least = history[-1]["test_loss"]
            self.state = {name: value.clone() for name, value in self.net.state_dict().items()}


class Plateau:
    """Steps a schedule by the test accuracy, which fit's own ReduceLROnPlateau does not get."""

    def __init__(self, optimizer):
        self.scheduler = ReduceLROnPlateau(optimizer, "max", patience=1, threshold=10)

    def step(self, history):
        self.scheduler.step(history[-1]["test_acc"])


# Each returns on_epoch and what is to be the same in the end. net, optimizer: of the run.
def a_closure(net, optimizer):
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    return lambda history: ema.update_parameters(net), ema


def two_whose_names_begin_alike(net, optimizer):
    ema, ema2 = AveragedModel(net), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    return lambda history: (ema.update_parameters(net), ema2.update_parameters(net)), ema2


def a_default(net, optimizer):
    ema = AveragedModel(net)

    def average(history, ema=ema):
        ema.update_parameters(net)

    return average, ema


def an_attribute_of_the_function(net, optimizer):
    def average(history):
        average.ema.update_parameters(net)

    average.ema = AveragedModel(net)
    return average, average.ema


def a_partial(net, optimizer):
    ema = AveragedModel(net)
    return functools.partial(lambda ema, history: ema.update_parameters(net), ema), ema


def a_namespace(net, optimizer):
    state = types.SimpleNamespace(ema=AveragedModel(net), net=net)
    return lambda history: state.ema.update_parameters(state.net), state.ema


def an_object(net, optimizer):
    shadow = Shadow(net)
    return shadow, shadow


def a_method(net, optimizer):
    best = Best(net)
    return best.note, best


def a_module(net, optimizer):
    average = Averaged(net)
    return average, average


def a_list_of_callbacks(net, optimizer):
    callbacks = [Shadow(net), Averaged(net)]
    return lambda history: [each(history) for each in callbacks], callbacks


def a_dict_of_tensors(net, optimizer):
    shadow = {name: value.detach().clone() for name, value in net.named_parameters()}

    def average(history):
        for name, value in net.named_parameters():
            shadow[name].lerp_(value.detach(), 0.5)

    return average, shadow


def a_hook(net, optimizer):
    ema = AveragedModel(net)
    optimizer.register_step_post_hook(lambda *_: ema.update_parameters(net))
    return None, ema


def a_hook_that_is_an_object(net, optimizer):
    shadow = Shadow(net)
    optimizer.register_step_pre_hook(shadow)
    return None, shadow


def a_schedule_in_a_closure(net, optimizer):
    plateau = Plateau(optimizer)
    return lambda history: plateau.scheduler.step(history[-1]["test_acc"]), plateau.scheduler


def a_schedule_of_an_object(net, optimizer):
    plateau = Plateau(optimizer)
    return plateau.step, plateau.scheduler


KINDS = [
    a_closure, two_whose_names_begin_alike, a_default, an_attribute_of_the_function, a_partial, a_namespace, an_object,
    a_method, a_module, a_list_of_callbacks, a_dict_of_tensors, a_hook, a_hook_that_is_an_object,
    a_schedule_in_a_closure, a_schedule_of_an_object,
]  # fmt: skip


def state_of(kept):
    """All that an object keeps, as plain values and tensors."""
    if isinstance(kept, list):
        return [state_of(each) for each in kept]
    if isinstance(kept, dict):
        return kept
    state = kept.state_dict() if hasattr(kept, "state_dict") else {}
    plain = {name: value for name, value in vars(kept).items() if isinstance(value, int | float | dict)}
    return state | {name: value for name, value in plain.items() if name[0] != "_"}


def built(kind):
    net = linear()
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    return net, optimizer, *kind(net, optimizer)


def trained(loaders, parts, **options):
    net, optimizer, on_epoch, _ = parts
    return fit(net, loaders, optimizer, epochs=4, on_epoch=on_epoch, **options)


def interrupted_in_epoch(number):
    """utils.measure, but for an interrupt in the epoch with this number."""
    measure, calls = utils.measure, iter(range(1, 100))

    def interrupted(*args, **options):
        if next(calls) == number:
            raise KeyboardInterrupt
        return measure(*args, **options)

    return interrupted


@pytest.mark.parametrize("goes_on", ["same objects", "new objects", "new process"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_callbacks_keep_goes_on_as_if_never_stopped(loaders, tmp_path, monkeypatch, kind, goes_on):
    whole, parts = built(kind), built(kind)
    history = trained(loaders, whole)
    with monkeypatch.context() as patch:
        patch.setattr(utils, "measure", interrupted_in_epoch(3))
        assert len(trained(loaders, parts, checkpoint=tmp_path / "c")) == 2
    if goes_on == "new process":
        monkeypatch.setattr(attributes, "PROCESS", secrets.token_hex(8))
    parts = parts if goes_on == "same objects" else built(kind)
    assert same(list(trained(loaders, parts, checkpoint=tmp_path / "c")), list(history))
    assert same(state_of(parts[-1]), state_of(whole[-1])) and not same(state_of(parts[-1]), state_of(built(kind)[-1]))


def test_an_average_in_a_hook_is_set_back_with_the_weights(loaders, monkeypatch):
    """The stop button in the second epoch: both are those of the first."""
    whole, stopped = built(a_hook), built(a_hook)
    fit(whole[0], loaders, whole[1])
    monkeypatch.setattr(utils, "measure", interrupted_in_epoch(2))
    assert len(trained(loaders, stopped)) == 1
    assert same(whole[0].state_dict(), stopped[0].state_dict())
    assert same(state_of(whole[-1]), state_of(stopped[-1]))


class Failing:
    """Something whose state cannot be had yet."""

    def state_dict(self):
        raise RuntimeError("not yet")

    def load_state_dict(self, state):
        raise AssertionError


@pytest.mark.parametrize("part, note", [(Failing(), "the state_dict of on_epoch part fails"), (Mock(), "")])
def test_what_has_no_state_to_give_is_told_and_stops_no_run(loaders, tmp_path, capsys, part, note):
    for checkpoint, epochs in ((None, 1), (tmp_path / "c", 1), (tmp_path / "c", 2)):
        net = linear()
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        options = {"checkpoint": checkpoint, "on_epoch": lambda history: part}
        assert len(utils.fit(net, *loaders, optimizer, epochs=epochs, **options)) == epochs
    said = capsys.readouterr().out
    assert "Going on after epoch 1" in said and (note in said if note else "It may differ" not in said)


class Late(Failing):
    """Something that has a state once it is ready."""

    ready = False

    def state_dict(self):
        return {"ready": True} if self.ready else super().state_dict()


def test_what_has_no_state_to_load_yet_is_told_and_stops_no_run(loaders, tmp_path, capsys):
    for epochs in (2, 3):
        late, net = Late(), linear()
        options = {"checkpoint": tmp_path / "c", "progress": True, "epochs": epochs}
        options["on_epoch"] = lambda history, late=late: vars(late).update(ready=True)
        assert len(fit(net, loaders, **options)) == epochs
    assert "It may differ from an uninterrupted run: the state_dict of on_epoch" in capsys.readouterr().out


def test_pictures_and_files_of_a_callback_are_left_alone(loaders, tmp_path, capsys):
    figure, ax = plt.subplots()
    file = (tmp_path / "log").open("a")

    def show(history):
        ax.clear()
        ax.plot([row["test_loss"] for row in history])
        print(history[-1], file=file)

    for epochs in (1, 3):
        net = linear()
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        utils.fit(net, *loaders, optimizer, epochs=epochs, checkpoint=tmp_path / "c", on_epoch=show)
    said = capsys.readouterr().out
    assert "Going on after epoch 1" in said and "It may differ" not in said
    assert len(ax.lines[0].get_xdata()) == 3
    plt.close(figure), file.close()


def a_dropout():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 10))
    return {"net": net}, lambda: setattr(net[1], "p", 0.0)


def frozen(at_first):
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    net[1].bias.requires_grad_(not at_first)
    return {"net": net}, lambda: net[1].bias.requires_grad_(at_first)


def a_criterion():
    criterion = nn.CrossEntropyLoss(label_smoothing=0.2)
    return {"criterion": criterion}, lambda: setattr(criterion, "label_smoothing", 0.0)


def the_kits_loader(**changes):
    loader = utils.Loader(IMAGES, LABELS.clone(), 16, shuffle=True, augment=True, device="cpu")
    return {"loader": loader}, lambda: vars(loader).update(changes)


def labels_in_place():
    loader = utils.Loader(IMAGES, LABELS.clone(), 16, device="cpu")
    return {"loader": loader}, lambda: loader.labels[:16].fill_(0)


def a_subset():
    subset = Subset(PAIRS, range(32))
    return {"loader": DataLoader(subset, 16)}, lambda: setattr(subset, "indices", range(16, 48))


def a_sampler():
    sampler = WeightedRandomSampler(torch.ones(48), 48)
    return {"loader": DataLoader(PAIRS, 16, sampler=sampler)}, lambda: sampler.weights[:24].zero_()


def pseudo_labels():
    pairs = TensorDataset(PAIRS.tensors[0], LABELS.clone())
    return {"loader": DataLoader(pairs, 16)}, lambda: pairs.tensors[1][:16].fill_(0)


def a_transform():
    flip = v2.Compose([v2.RandomHorizontalFlip(1.0)])
    return {"loader": DataLoader(Transformed(flip), 16)}, lambda: setattr(flip.transforms[0], "p", 0.0)


def negated(image):
    return -image


class Transformed(torch.utils.data.Dataset):
    def __init__(self, transform=None):
        self.transform = transform

    def __len__(self):
        return len(PAIRS)

    def __getitem__(self, i):
        image, label = PAIRS[i]
        return self.transform(image) if self.transform else image, label


IMAGES = torch.randint(256, (48, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
LABELS = torch.arange(48) % 10
PAIRS = TensorDataset(IMAGES[:, :, ::2, ::2] / 255.0, LABELS)
SETTINGS = {
    "a dropout's p": a_dropout,
    "a layer unfrozen": lambda: frozen(True),
    "a layer frozen": lambda: frozen(False),
    "a criterion's smoothing": a_criterion,
    "the batch size": lambda: the_kits_loader(batch_size=24),
    "the augmentation": lambda: the_kits_loader(augment=False),
    "the loader's seed": lambda: the_kits_loader(seed=7),
    "labels in place": labels_in_place,
    "a subset's indices": a_subset,
    "a sampler's weights": a_sampler,
    "labels of a data set": pseudo_labels,
    "a transform's p": a_transform,
}


def fit_and_set(make, epochs, checkpoint=None):
    """Fits with a callback that sets something after the first epoch; returns the weights."""
    torch.manual_seed(0)
    parts, set_it = make()
    loader, kits = parts.get("loader", DataLoader(PAIRS, 16)), utils.Loader(IMAGES, LABELS, 48, device="cpu")
    is_kits = isinstance(loader, utils.Loader)
    net = parts.get("net") or nn.Sequential(nn.Flatten(), nn.Linear(192 if is_kits else 48, 10))
    utils.fit(
        net, loader, kits if is_kits else DataLoader(PAIRS, 48), torch.optim.SGD(net.parameters(), 0.05),
        epochs=epochs, checkpoint=checkpoint, criterion=parts.get("criterion", nn.CrossEntropyLoss()),
        on_epoch=lambda history: set_it() if len(history) == 1 else None,
    )  # fmt: skip
    return net.state_dict()


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_a_callback_sets_stays_set(tmp_path, setting, capsys):
    whole = fit_and_set(SETTINGS[setting], 4)
    fit_and_set(SETTINGS[setting], 2, tmp_path / "c")
    assert same(fit_and_set(SETTINGS[setting], 4, tmp_path / "c"), whole)
    assert "may differ" not in capsys.readouterr().out
    other = fit_and_set(lambda: (SETTINGS[setting]()[0], lambda: None), 4)
    assert not same(other, whole)  # it has an effect


def another_data_set():
    pairs = ConcatDataset([Subset(PAIRS, range(16))])

    def add():
        pairs.datasets.append(Subset(PAIRS, range(16, 48)))
        pairs.cumulative_sizes = pairs.cumsum(pairs.datasets)

    return {"loader": DataLoader(pairs, 16)}, add


def another_function():
    data = Transformed()
    return {"loader": DataLoader(data, 16)}, lambda: setattr(data, "transform", lambda image: image * 2)


@pytest.mark.parametrize(
    "make, told",
    [(another_data_set, "loader.dataset.datasets cannot be kept"), (another_function, "transform cannot be kept")],
)
def test_what_a_callback_sets_and_no_file_keeps_is_told(tmp_path, make, told, capsys):
    for epochs in (2, 3):
        fit_and_set(make, epochs, tmp_path / "c")
    assert told in capsys.readouterr().out


def test_what_the_callback_sets_again_is_not_told(tmp_path, capsys):
    for epochs in (2, 3):
        data, net = Transformed(), nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
        utils.fit(
            net, DataLoader(data, 16), DataLoader(PAIRS, 48), torch.optim.SGD(net.parameters(), 0.05), epochs=epochs,
            checkpoint=tmp_path / "c", on_epoch=lambda history, data=data: setattr(data, "transform", negated),
        )  # fmt: skip
    assert "may differ" not in capsys.readouterr().out


def test_a_callback_stops_a_run_early(loaders):
    def stop(history):
        if len(history) == 2:
            raise KeyboardInterrupt

    assert len(fit(linear(), loaders, epochs=4, on_epoch=stop)) == 2
