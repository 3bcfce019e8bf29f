import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import AUTO_LINE, NORMS, QUIET, THREE, everything, linear, run, same, stand_in
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

import model
import utils
from normkit import anatomy, plots
from normkit.backend import Compiled, choose_backend
from normkit.checks import check_epochs
from normkit.data import Data
from normkit.fused import fuse
from normkit.meter import Meter
from normkit.synthetic import make_synthetic


def by_hand(net, loader):
    """Mean loss of an image and accuracy in percent, one image at a time."""
    images, labels = everything(loader)
    losses, hits = [], 0
    for image, label in zip(images, labels, strict=True):
        p = net(image[None]).softmax(1)[0].double()
        losses.append(-p[label].log().item())
        hits += int(p.argmax() == label)
    return sum(losses) / len(losses), 100 * hits / len(losses)


@pytest.mark.parametrize("batch_size", [1, 64, 101, 1000])
def test_metrics_equal_those_by_hand_with_a_ragged_last_batch(data, batch_size):
    train_loader, test_loader = utils.get_loaders(data, batch_size, device="cpu")
    net = linear()
    trained = utils.train(net, train_loader, torch.optim.SGD(net.parameters(), 0.0), precision="float32", **QUIET)
    tested = utils.test(net, test_loader, precision="float32")
    for metrics, loader in ((trained, train_loader), (tested, test_loader)):
        loss, accuracy = by_hand(net, loader)
        assert metrics.loss == pytest.approx(loss, rel=1e-5)
        assert metrics.accuracy == pytest.approx(accuracy)
        assert metrics.total == len(loader.labels) and metrics.correct == round(accuracy * metrics.total / 100)
        assert [type(figure) for figure in metrics] == [float, float, int, int]


def test_an_epoch_equals_plain_sgd(data):
    loader = utils.get_loaders(data, 64, device="cpu")[0]
    net, plain = linear(), linear()
    utils.train(net, loader, torch.optim.SGD(net.parameters(), 0.01, 0.9), precision="float32", **QUIET)
    optimizer = torch.optim.SGD(plain.parameters(), 0.01, 0.9)
    loader.epoch = 0
    for images, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(plain(images), labels).backward()
        optimizer.step()
    torch.testing.assert_close(net.state_dict(), plain.state_dict())


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_fused_optimizers_find_their_state_when_a_model_is_laid_out_anew(name):
    weights, loader = [], utils.get_loaders(stand_in(24, 10), 24, device="cpu")[0]
    for fused in (True, False):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 10, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        options = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = getattr(torch.optim, name)(net.parameters(), 0.01, **options, fused=fused)
        for memory_format in (torch.channels_last, torch.contiguous_format, torch.channels_last):
            net.to(memory_format=memory_format)
            utils.train(net, loader, optimizer, precision="float32", **QUIET)
        weights.append(net.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)


def test_a_plain_dataloader_will_do(data, device):
    images, labels = everything(utils.get_loaders(data, 64, device="cpu")[1])
    loader = DataLoader(TensorDataset(images, labels), 30)
    net = linear().to(device)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    history = utils.fit(net, loader, loader, optimizer, StepLR(optimizer, 1), epochs=2, **QUIET)
    assert len(history) == 2
    own = utils.get_loaders(data, 30, device=device)[1]
    assert utils.test(net, loader) == pytest.approx(utils.test(net, own), rel=1e-3)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("batch_size", [1, 100])  # 101 test images: a last batch of one
def test_every_norm_at_batch_size_one_and_with_a_last_image_alone(data, norm, batch_size, device):
    few = Data(
        "few",
        data.classes,
        *(part[:11] for part in (data.train_images, data.train_labels)),
        data.test_images,
        data.test_labels,
    )
    result = utils.run(norm, few, 1, batch_size, device=device, augment=True, **QUIET)
    assert result.history[0]["train_loss"] > 0 and 0 <= result.history[0]["test_acc"] <= 100


@pytest.mark.parametrize("norm", THREE)
def test_each_norm_learns_the_stand_in(norm):
    result = utils.run(norm, stand_in(5000, 1000), epochs=2, **QUIET)
    assert [row["epoch"] for row in result.history] == [1, 2]
    assert result.history[-1]["test_acc"] > 35  # chance is 10
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"] - 0.2


@pytest.mark.parametrize("norm", NORMS)
def test_the_same_seed_gives_the_same_run(data, norm):
    first, again, other = (
        utils.run(norm, data, 2, seed=seed, device="cpu", augment=True, dropout=0.1, **QUIET) for seed in (1, 1, 2)
    )
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    drop_time = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in result.history] for result in (first, again, other)
    ]
    assert drop_time[0] == drop_time[1] != drop_time[2]


def test_looking_changes_nothing(data, capsys):
    """Evaluation, summary, batches and pictures move neither weights, running statistics, modes nor seeds."""
    net = model.Net("batch", dropout=0.5).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random_state = torch.get_rng_state()
    train_loader, test_loader = utils.get_loaders(data, device="cpu")
    next(iter(train_loader))
    utils.test(net, test_loader)
    logits, _ = utils.predict(net, test_loader)
    anatomy.summarize(net)
    plots.plot_samples(data)
    plots.plot_mistakes(data, logits)
    assert net.training and torch.equal(random_state, torch.get_rng_state())
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("backend", ["eager", "auto", "compile"])
def test_evaluation_is_without_dropout_and_restores_the_mode(data, backend, monkeypatch):
    compile_with("eager", monkeypatch)
    net, loader = model.Net("group", dropout=0.9).eval(), utils.get_loaders(data, 101, device="cpu")[1]
    assert utils.test(net, loader, backend=backend) == utils.test(net.train(), loader, backend=backend)
    assert net.training and not (utils.test(net.eval(), loader, backend=backend) and net.training)


@pytest.mark.parametrize("wrap", [lambda net: net, fuse, Compiled])
@pytest.mark.parametrize("frozen", ["C4", "C4.norm", "C9.dropout"])
def test_evaluation_restores_the_mode_of_each_module(data, wrap, frozen, monkeypatch):
    compile_with("eager", monkeypatch)
    net, loader = model.Net("batch").train(), utils.get_loaders(data, 101, device="cpu")[1]  # of one batch
    net.get_submodule(frozen).eval()
    modes = [module.training for module in net.modules()]
    network = wrap(net)
    assert [module.training for module in net.modules()] == modes and network.training
    utils.predict(network, loader)
    assert [module.training for module in net.modules()] == modes and network.training


# ----------------------------------------------------------------------- schedule and log


def test_the_printed_lines_and_steplrs_sequence(data, capsys):
    net = linear()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    history = utils.fit(net, *utils.get_loaders(data, 64, device="cpu"), optimizer, StepLR(optimizer, 2, 0.1), epochs=5)
    assert [row["lr"] for row in history] == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001])
    lines = [line.split("\r")[-1] for line in capsys.readouterr().out.split("\n") if line]
    assert len(lines) == 21
    assert re.fullmatch(r"Backend: eager: PyTorch's modules \(no fused kernel: .*\)", lines[0])
    blocks = [lines[i : i + 4] for i in range(1, 21, 4)]
    for (rate, name, bar, test), row in zip(blocks, history, strict=True):
        assert rate == f"Adjusting learning rate of group 0 to {row['lr']:.4e}."
        assert name == f"Epoch {row['epoch']}"
        metrics, progress = bar.split(": 100%", 1)
        assert re.fullmatch(r"Train: Loss=\d+\.\d{4} Batch_id=3 Accuracy=\d+\.\d\d", metrics)
        assert re.fullmatch(r"\|█+\| 4/4 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+(it/s|s/it)\] *", progress)
        assert f"Accuracy={row['train_acc']:.2f}:" in bar
        hits = round(row["test_acc"] * 101 / 100)
        assert test == f"Test set: Average loss: {row['test_loss']:.4f}, Accuracy: {hits}/101 ({row['test_acc']:.2f}%)"


def test_silence(data, capsys):
    utils.run("group", data, 1, **QUIET)
    assert capsys.readouterr().out == ""


def test_a_single_epoch_says_what_computes_it(data, capsys):
    loader = utils.get_loaders(data, 110, device="cpu")[0]
    for net, line in ((model.Net("group"), AUTO_LINE), (linear(), "the model is a Sequential: the kernel computes")):
        utils.train(net, loader, torch.optim.SGD(net.parameters(), 0.0), precision="float32")
        first = capsys.readouterr().out.splitlines()[0]
        assert first.startswith("Backend: ") and (line in first or AUTO_LINE.startswith("eager"))


def test_the_loss_in_the_bar_is_the_last_batchs(data, capsys):
    net, loader = linear(), utils.get_loaders(data, 64, device="cpu")[0]
    utils.train(net, loader, torch.optim.SGD(net.parameters(), 0.0), precision="float32")
    loader.epoch = 0
    *_, (images, labels) = loader
    loss = F.cross_entropy(net(images), labels).item()
    assert f"Loss={loss:.4f}" in capsys.readouterr().out.split("\r")[-1]


def test_the_classic_schedule_is_the_default(data):
    rates = [row["lr"] for row in utils.run("batch", make_synthetic(20, 10), epochs=16, **QUIET).history]
    assert rates == pytest.approx([0.01] * 7 + [0.001] * 7 + [0.0001] * 2)


def test_other_schedulers_per_epoch_and_per_batch(data):
    def history(make, **options):
        net = linear()
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        scheduler = make(optimizer)
        return utils.fit(
            net, *utils.get_loaders(data, 64, device="cpu"), optimizer, scheduler, 3, **options, **QUIET
        ), scheduler

    rows, _ = history(lambda optimizer: ExponentialLR(optimizer, 0.5))
    assert [row["lr"] for row in rows] == pytest.approx([0.01, 0.005, 0.0025])
    rows, scheduler = history(lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=12), scheduler_step="batch")
    assert scheduler.last_epoch == 12 and rows[1]["lr"] > rows[0]["lr"] > rows[2]["lr"] / 100
    rows, scheduler = history(lambda optimizer: ReduceLROnPlateau(optimizer, threshold=1e9, patience=0))
    assert rows[2]["lr"] < rows[0]["lr"]
    rows, _ = history(lambda optimizer: None)
    assert [row["lr"] for row in rows] == [0.01] * 3


def test_reduce_lr_on_plateau_is_given_what_its_mode_asks_for(data):
    for mode, column in (("min", "train_loss"), ("max", "train_acc")):
        net, given = linear(), []
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        scheduler = ReduceLROnPlateau(optimizer, mode)
        step = scheduler.step
        scheduler.step = lambda value, step=step, given=given: given.append(value) or step(value)
        rows = utils.fit(net, *utils.get_loaders(data, 64, device="cpu"), optimizer, scheduler, 2, **QUIET)
        assert given == [row[column] for row in rows]


def test_on_epoch_sees_the_history_grow_and_what_a_checkpoint_held(data, tmp_path):
    seen = []
    options = QUIET | {"on_epoch": lambda history: seen.append([row["epoch"] for row in history])}
    utils.run("layer", data, 2, checkpoint=tmp_path / "c", **options)
    utils.run("layer", data, 3, checkpoint=tmp_path / "c", **options)
    assert seen == [[1], [1, 2], [1, 2], [1, 2, 3]]


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("epochs", [0, -1, 1.5, None, True, "2"])
def test_epochs_are_checked(data, epochs):
    net = linear()
    with pytest.raises(ValueError, match="epochs=.*expected a whole number of at least 1"):
        utils.fit(net, *utils.get_loaders(data), torch.optim.SGD(net.parameters(), 0.01), epochs=epochs, **QUIET)


def test_numpys_whole_numbers_are_epochs(data):
    assert len(run(data, epochs=np.int64(2), batch_size=np.int32(100)).history) == 2


def test_more_than_twenty_epochs_says_how_to_lift_the_limit():
    check_epochs(20, 20)
    with pytest.raises(ValueError, match="the assignment allows 20. To lift that, change limit="):
        check_epochs(21, 20)


def test_a_loader_that_yields_nothing():
    net, empty = linear(), DataLoader(TensorDataset(torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.int64)))
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for call in (
        lambda: utils.train(net, empty, optimizer, **QUIET),
        lambda: utils.test(net, empty),
        lambda: utils.fit(net, empty, empty, optimizer, **QUIET),
    ):
        with pytest.raises(ValueError, match="yields no"):
            call()
    with pytest.raises(ValueError, match="empty"):
        utils.Loader(torch.zeros(0, 3, 32, 32, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))


def test_unknown_scheduler_step(data):
    net = linear()
    with pytest.raises(ValueError, match="'step'.*epoch or batch"):
        utils.fit(net, *utils.get_loaders(data), torch.optim.SGD(net.parameters(), 0.01), scheduler_step="step")


def test_a_loss_that_is_not_finite_stops_the_run(data):
    with pytest.raises(FloatingPointError, match="epoch 1"):
        utils.run("group", data, 2, lr=1e30, **QUIET)


# ------------------------------------------------------------------------------- backends


@pytest.mark.parametrize("norm", THREE)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_how_a_run_is_computed_is_chosen_by_a_keyword_and_does_not_change_its_metrics(data, norm, precision, capsys):
    losses = []
    ways = (
        ("contiguous", "eager", "eager: PyTorch's modules"),
        ("channels_last", "eager", "eager: PyTorch's modules"),
        ("contiguous", "auto", AUTO_LINE),
        ("channels_last", "auto", AUTO_LINE),
    )
    for memory_format, backend, shown in ways:
        how = {"precision": precision, "memory_format": memory_format, "backend": backend, "device": "cpu"}
        result = utils.run(norm, data, 1, dropout=0, **how)
        losses.append(result.history[0]["train_loss"])
        first_line, second_line, *_ = capsys.readouterr().out.splitlines()
        assert first_line == (
            f"{norm} norm on {data.name}: cpu ({torch.get_num_threads()} threads), {precision}, fused SGD"
        )
        assert second_line == f"Backend: {shown}"
        assert all(parameter.is_contiguous() for parameter in result.model.parameters())
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-4 if precision == "float32" else 0.02)


def test_a_kernel_that_is_asked_for_and_cannot_be_had_is_an_error_that_says_why(data, capsys):
    net = linear()
    with pytest.raises(ValueError, match="backend='fused' cannot be had: the model is a Sequential"):
        utils.train(net, utils.get_loaders(data)[0], torch.optim.SGD(net.parameters(), 0.01), backend="fused")
    for backend in ("warp", None):
        with pytest.raises(ValueError, match=f"unknown backend {backend!r}: choose auto, eager, fused or compile"):
            utils.test(net, utils.get_loaders(data)[1], backend=backend)
    assert capsys.readouterr().out == ""


def compile_with(backend, monkeypatch):
    """Has torch.compile use a backend that needs no compiler."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode, **how: compile(model, backend=backend, **how))


@pytest.mark.parametrize("norm", NORMS)
def test_a_compiled_run_starts_and_draws_as_one_that_is_not(data, norm, monkeypatch, capsys, tmp_path):
    """With a backend that runs each operation as it is, the two agree to the last bit."""
    graphs = []
    compile_with(lambda graph, inputs: graphs.append(inputs) or graph.forward, monkeypatch)
    options = {"epochs": 2, "device": "cpu", "dropout": 0.1}
    compiled = utils.run(norm, data, backend="compile", checkpoint=tmp_path / "c", **options)
    assert len(graphs) >= 4  # training and evaluation, whole and ragged batches
    printed = capsys.readouterr().out
    assert printed.splitlines()[1] == "Backend: torch.compile" and "Not compiled" not in printed
    options["backend"] = "eager"
    plain = utils.run(norm, data, checkpoint=tmp_path / "c", **options)  # the one's checkpoint is the other's
    assert plain.history == compiled.history
    plain = utils.run(norm, data, **options)
    assert type(compiled.model) is model.Net and same(plain.history, compiled.history)
    for own, its in zip(plain.model.state_dict().values(), compiled.model.state_dict().values()):
        assert torch.equal(own, its)


def test_where_nothing_can_be_compiled_the_run_goes_on_as_written(data, monkeypatch, capsys):
    def broken(graph, inputs):
        raise OSError("no C++ compiler")

    compile_with(broken, monkeypatch)
    options = {"norm": "batch", "data": data, "epochs": 2, "device": "cpu", "dropout": 0.1}
    histories = [utils.run(backend=backend, **options).history for backend in ("compile", "eager")]
    assert same(*histories)
    printed = capsys.readouterr().out
    assert printed.count("Not compiled, goes on with PyTorch's modules. ") == 1 and "no C++ compiler" in printed


def test_what_cannot_be_compiled_says_why_and_computes_as_written(monkeypatch, capsys):
    def broken(graph, inputs):
        raise OSError("no C++ compiler")

    compile_with(broken, monkeypatch)
    net, images = model.Net("layer").eval(), torch.randn(2, 3, 8, 8)
    compiled = Compiled(net)
    assert compiled.reason is None and capsys.readouterr().out == ""  # lazily, at the first call
    for _ in range(2):
        assert torch.equal(compiled(images), net(images))
    assert "no C++ compiler" in compiled.reason
    assert choose_backend("auto", compiled)[1] == f"eager: PyTorch's modules (not compiled: {compiled.reason})"
    assert capsys.readouterr().out == f"Not compiled, goes on with PyTorch's modules. {compiled.reason}\n"


def test_an_error_of_the_images_is_none_of_the_compilers(monkeypatch, capsys):
    compile_with("eager", monkeypatch)
    compiled = Compiled(model.Net("layer"))
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\)"):
        compiled(torch.zeros(1, 3, 30, 32))
    assert compiled.reason is None and compiled(torch.zeros(1, 3, 8, 8)).shape == (1, 10)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_a_compiled_network_has_the_metrics_of_the_written_one(data, norm, device, capsys):
    """On batches of one size, as each further one is compiled anew: half a minute."""
    options = {
        "data": data.first(198, 66),
        "epochs": 2,
        "batch_size": 66,
        "device": device,
        "dropout": 0,
        "precision": "float32",
    }
    compiled, plain = (utils.run(norm, backend=backend, **options).history for backend in ("compile", "eager"))
    printed = capsys.readouterr().out
    assert "Backend: torch.compile" in printed and "Not compiled" not in printed
    for one, other in zip(compiled, plain):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-2)
        assert one["test_loss"] == pytest.approx(other["test_loss"], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_mean_loss_is_as_good_whatever_the_criterions_dtype(device, dtype):
    """A sum in bfloat16 would stop growing, and one in float16 would be infinite soon."""
    net, batch = linear().to(device), (torch.zeros(64, 3, 16, 16), torch.zeros(64, dtype=torch.int64))

    def criterion(logits, labels):
        return 400 + F.cross_entropy(logits, labels).to(dtype)

    metrics = utils.train(net, [batch] * 300, torch.optim.SGD(net.parameters(), 0.0), criterion=criterion, **QUIET)
    expected = criterion(net(batch[0].to(device)), batch[1].to(device)).item()
    assert metrics.loss == pytest.approx(expected, rel=1e-4)
    meter = Meter()
    meter.add(torch.ones((), dtype=dtype, device="meta"), torch.ones((), dtype=torch.int64, device="meta"), 64)
    assert meter.waiting[0][0].dtype == torch.float32
