"""Steps as CUDA graphs: the numbers of a plain loop, or else the plain loop itself.

Without a GPU a stand-in takes a graph's place, which computes what was to be recorded anew at each launch: so all but
CUDA itself is tested everywhere.
"""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import THREE, count_backward, stand_in
from torch import nn

import model
import utils
from normkit import graph
from normkit.backend import Compiled
from normkit.device import autocast
from normkit.graph import Graphed, GraphedLoss, StepGraph


class Recomputed:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self, step, compute):
        self.step, self.compute = step, compute

    def replay(self):
        step = self.step
        if not hasattr(step, "loss"):
            step.loss, step.correct, step.gradients = self.compute()
        else:
            loss, correct, gradients = self.compute()
            for place, value in zip((step.loss, step.correct, *step.gradients), (loss, correct, *gradients)):
                place.copy_(value)


def recompute(self, network, compute):
    self.graph = Recomputed(self, compute)


@pytest.fixture
def device(device, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr(graph, "DEVICE", "cpu")
        monkeypatch.setattr(StepGraph, "record", recompute)
    # Else two runs of the same on a GPU differ by rounding.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield device


@pytest.fixture
def by_graph(monkeypatch):
    return count_backward(GraphedLoss, monkeypatch)


@pytest.fixture
def recorded(monkeypatch):
    """Collects the batch sizes for which a graph was recorded."""
    sizes, record = [], StepGraph.record

    def recording(self, *call):
        sizes.append(len(self.images))
        record(self, *call)

    monkeypatch.setattr(StepGraph, "record", recording)
    return sizes


def loader_of(size, batch_size, device):
    return utils.get_loaders(stand_in(size, 10), batch_size, device=device)[0]


def net_on(device, norm="batch", dropout=0.0):
    torch.manual_seed(0)
    return model.Net(norm, dropout=dropout).to(device)


def plain_loop(net, loader, optimizer, criterion=F.cross_entropy):
    net.train()
    for images, labels in loader:
        optimizer.zero_grad()
        criterion(net(images), labels).backward()
        optimizer.step()


def train(net, loader, optimizer, criterion=F.cross_entropy, precision="float32"):
    return utils.train_epoch(net, loader, optimizer, None, criterion, precision, progress=False)


def assert_same(net, expected, rtol=1e-2, atol=5e-3):
    for (name, one), other in zip(net.state_dict().items(), expected.state_dict().values()):
        if not name.endswith(("conv.bias", "c3.bias", "c6.bias", "running_mean")):  # batch norm subtracts what they add
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def muon(parameters):
    return utils.build_optimizer(nn.ParameterList(parameters), utils.RECIPES["best"])


OPTIMIZERS = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.01),
    "fused SGD": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, fused=True),
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-3, eps=1e-3),
    "Muon": muon,
}


@pytest.mark.parametrize("norm", THREE)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_epochs_are_the_plain_loops(norm, name, device, by_graph, recorded):
    nets = net_on(device, norm), net_on(device, norm)
    for net, epoch in zip(nets, (train, plain_loop)):
        optimizer, loader = OPTIMIZERS[name](net.parameters()), loader_of(37, 8, device)
        network = Graphed(net) if epoch is train else net
        for _ in range(2):
            epoch(network, loader, optimizer)
    assert by_graph == {True: 8, False: 2} and recorded == [8, 5]  # the first of each size goes step by step
    assert_same(*nets)


def test_a_loader_of_batches_on_the_cpu(device, by_graph):
    nets = net_on(device, "group"), net_on(device, "group")
    batches = [(images.cpu(), labels.cpu()) for images, labels in loader_of(32, 8, device)]
    metrics = [train(net, batches, torch.optim.SGD(net.parameters(), 0.01)) for net in (Graphed(nets[0]), nets[1])]
    assert by_graph == {True: 3, False: 1} and metrics[0].correct == metrics[1].correct
    assert_same(*nets)


@pytest.mark.parametrize("where", ["cpu", "device"])
@pytest.mark.parametrize("wrong", [-1, 10])
def test_a_label_that_is_no_class_is_an_error(where, wrong, device):
    """On a GPU labels are looked at in the first batch; here that is of a second epoch, so that there is a graph."""
    network = Graphed(net_on(device))
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4).to(device if where == "device" else "cpu")
    train(network, [(images, labels)] * 3, optimizer)
    labels[2] = wrong
    with pytest.raises(ValueError, match="labels run from .*: expected 0 to 9 for the network's 10 outputs"):
        train(network, [(images, labels)] * 3, optimizer)


def test_settings_that_decide_how_a_step_is_computed(device, recorded):
    """A graph of float32 products is none of TF32's; either of PyTorch's two ways to set that can be read."""
    network = Graphed(net_on(device))
    optimizer, batches = torch.optim.SGD(network.parameters(), 0.01), loader_of(32, 8, device)
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        for epoch, precision in enumerate(["ieee", "tf32", "ieee"]):
            matmul.fp32_precision = precision
            train(network, batches, optimizer)
            assert len(recorded) == min(epoch + 1, 2)
    finally:
        matmul.fp32_precision = before


def test_a_loader_whose_batches_all_differ_records_nothing(device, by_graph, recorded):
    batches = [(torch.randn(n, 3, 8, 8, device=device), torch.arange(n, device=device) % 10) for n in range(1, 12)]
    network = Graphed(net_on(device))
    train(network, batches, torch.optim.SGD(network.parameters(), 0.01))
    assert by_graph == {False: 11} and not recorded and len(network.graphs) == graph.MAX_GRAPHS


def test_few_graphs_are_kept(device, recorded):
    batches = [(torch.randn(n, 3, 8, 8, device=device), torch.arange(n, device=device)) for n in range(1, 8)] * 2
    batches.sort(key=lambda batch: len(batch[0]))
    network = Graphed(net_on(device, "layer"))
    train(network, batches, torch.optim.SGD(network.parameters(), 0.01))
    assert recorded == list(range(1, 8))
    assert [len(each.images) for each in network.graphs.values()] == [4, 5, 6, 7]


def tie(net):
    net.C8.conv.weight = net.C9.conv.weight
    return net


def share(net):
    net.C9.norm, net.head, net.stages = net.C8.norm, net.C10, nn.ModuleList([net.C1, net.C2])
    return net


@pytest.mark.parametrize("change", [tie, share])
def test_parameters_of_several_names(change, device, recorded):
    nets = [change(net_on(device, "group")) for _ in range(2)]
    parameters = list(nets[0].parameters())
    train(Graphed(nets[0]), loader_of(48, 8, device), torch.optim.SGD(nets[0].parameters(), 0.01))
    plain_loop(nets[1], loader_of(48, 8, device), torch.optim.SGD(nets[1].parameters(), 0.01))
    assert all(one is other for one, other in zip(parameters, nets[0].parameters(), strict=True)) and recorded == [8]
    assert_same(*nets, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_are_laid_out_as_their_parameters(fused, device):
    """Of images in another layout, which the convolutions' gradients take from them."""
    nets = net_on(device, "layer"), net_on(device, "layer")
    batches = [(images.to(memory_format=torch.channels_last), labels) for images, labels in loader_of(48, 8, device)]
    train(Graphed(nets[0]), batches, torch.optim.SGD(nets[0].parameters(), 0.01, momentum=0.9, fused=fused))
    plain_loop(nets[1], batches, torch.optim.SGD(nets[1].parameters(), 0.01, momentum=0.9))
    assert all(each.grad.stride() == each.stride() for each in nets[0].parameters())
    assert_same(*nets, rtol=1e-4, atol=1e-5)


class Replacing(torch.optim.SGD):
    """Puts new tensors in place of the weights at each step."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.data = parameter.data - 0.01 * parameter.grad


def test_a_graph_that_no_step_would_use_again_is_not_recorded_again(device, recorded, capsys):
    nets = net_on(device, "layer"), net_on(device, "layer")
    network = Graphed(nets[0])
    train(network, loader_of(48, 8, device), Replacing(nets[0].parameters(), 0.01))
    plain_loop(nets[1], loader_of(48, 8, device), torch.optim.SGD(nets[1].parameters(), 0.01))
    assert recorded == [8] and "replaced again and again" in network.reason
    assert capsys.readouterr().out == f"No CUDA graph, goes on step by step. {network.reason}\n"
    assert_same(*nets, rtol=1e-4, atol=1e-5)


CHANGES = {
    "dropout": lambda net: setattr(net.C4.dropout, "p", 0.5),
    "momentum of running averages": lambda net: setattr(net.C1.norm, "momentum", 0.5),
    "a frozen filter": lambda net: net.C5.conv.weight.requires_grad_(False),
    "weights elsewhere": lambda net: setattr(net.C2.conv.weight, "data", net.C2.conv.weight.data.clone() * 0.5),
    "a new parameter": lambda net: setattr(net.C2.conv, "bias", nn.Parameter(net.C2.conv.bias.detach() + 0.1)),
    "statistics elsewhere": lambda net: setattr(net.C7.norm, "running_var", net.C7.norm.running_var + 1),
    "a norm in evaluation": lambda net: net.C3.norm.eval(),
    "a forward hook": lambda net: net.C3.register_forward_hook(lambda module, args, output: output * 0.5),
    "a hook of a gradient": lambda net: net.C3.conv.weight.register_hook(lambda gradient: gradient * 0.5),
    "another norm": lambda net: setattr(net.C4, "norm", nn.InstanceNorm2d(32).to(net.C10.weight.device)),
    "another convolution": lambda net: setattr(net.C8, "conv", copy.deepcopy(net.C9.conv)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_steps_is_followed(name, device):
    """A loader that changes the network in mid-epoch stands for whoever does so."""
    losses = []
    for wrap in (Graphed, lambda net: net):
        net = net_on(device)
        network, optimizer = wrap(net), torch.optim.SGD(net.parameters(), 0.02)
        batches = list(loader_of(64, 8, device))

        class Changing:
            def __len__(self):
                return len(batches)  # noqa: B023

            def __iter__(self):
                yield from batches[:4]  # noqa: B023
                torch.manual_seed(1)
                CHANGES[name](net)  # noqa: B023
                yield from batches[4:]  # noqa: B023

        losses.append(train(network, Changing(), optimizer).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def doubled(logits, labels):
    return 2 * F.cross_entropy(logits, labels)


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(label_smoothing=0.2), doubled])
def test_another_criterion_goes_step_by_step(criterion, device, by_graph):
    nets = net_on(device, "group"), net_on(device, "group")
    train(Graphed(nets[0]), loader_of(24, 8, device), torch.optim.SGD(nets[0].parameters(), 0.01), criterion=criterion)
    plain_loop(nets[1], loader_of(24, 8, device), torch.optim.SGD(nets[1].parameters(), 0.01), criterion)
    assert by_graph == {False: 3}
    assert_same(*nets)


class Remembering(torch.optim.SGD):
    """Goes along the gradients of the step before as well, and adds to what is in .grad."""

    kept = ()

    def zero_grad(self, set_to_none=False):
        super().zero_grad(set_to_none=False)

    def step(self, closure=None):
        parameters = self.param_groups[0]["params"]
        with torch.no_grad():
            for parameter, before in zip(parameters, self.kept):
                parameter.add_(before, alpha=-0.005)
        self.kept = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = parameter.grad.clone()
        return super().step(closure)


def test_gradients_belong_to_whoever_keeps_them(device, by_graph):
    nets = net_on(device, "layer"), net_on(device, "layer")
    losses = []
    for net, network in zip(nets, (Graphed(nets[0]), nets[1])):
        optimizer, batches = Remembering(net.parameters(), 0.01), loader_of(40, 8, device)
        losses.append(train(network, batches, optimizer).loss)
    assert by_graph == {True: 4, False: 1}
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert_same(*nets)


def test_what_cannot_be_recorded_goes_on_step_by_step(device, monkeypatch, capsys):
    """As when an operation has to wait for the GPU."""
    cross_entropy = F.cross_entropy

    def waiting(logits, labels):
        loss = cross_entropy(logits, labels)
        if device.type == "cpu":
            raise RuntimeError("operation not permitted when stream is capturing")
        loss.item()  # while warming up, too, and only then allowed
        return loss

    def record(self, *call):
        with monkeypatch.context() as patch:
            patch.setattr(graph.F, "cross_entropy", waiting)
            if device.type == "cpu":
                call[-1]()
            original(self, *call)

    original = StepGraph.record
    monkeypatch.setattr(StepGraph, "record", record)
    dropout = 0.1 if device.type == "cuda" else 0  # the stand-in does not give back what it has drawn
    nets = net_on(device, dropout=dropout), net_on(device, dropout=dropout)
    network, losses = Graphed(nets[0]), []
    for net, each in zip(nets, (network, nets[1])):
        torch.manual_seed(0)
        losses.append(train(each, loader_of(40, 8, device), torch.optim.SGD(net.parameters(), 0.01)).loss)
    printed = capsys.readouterr().out
    assert printed.count("No CUDA graph, goes on step by step. ") == 1 and "captur" in printed
    assert "captur" in network.reason and not any(network.graphs.values())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_dropout_and_statistics_go_on_as_without_graphs(device):
    """Recording draws no random number and moves no running average."""
    states, ends = [], []
    for wrap in (Graphed, lambda net: net):
        net = net_on(device, dropout=0.3)
        train(wrap(net), loader_of(50, 8, device), torch.optim.SGD(net.parameters(), 0.0))
        states.append({name: each for name, each in net.state_dict().items() if "running" in name or "num_" in name})
        ends.append(torch.rand(3, device=device))
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)
    assert torch.equal(*ends)


def test_evaluation_and_copies(device):
    net = net_on(device, dropout=0.3)
    network = Graphed(net)
    loader, optimizer = list(loader_of(32, 8, device)), torch.optim.SGD(net.parameters(), 0.01)
    train(network, loader, optimizer)
    logits = []
    utils.evaluate(network, loader, "float32", lambda own, labels: logits.append(own))
    expected, _ = utils.predict(net, loader, backend="eager", precision="float32")
    torch.testing.assert_close(torch.cat(logits), expected)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert not twin.graphs and twin.reason is None
        before = [each.clone() for each in net.parameters()]
        train(twin, loader, torch.optim.SGD(twin.parameters(), 0.01))
        assert all(map(torch.equal, before, net.parameters()))


def test_a_compiled_step_is_recorded_and_the_parameters_stay(device, monkeypatch, by_graph):
    compile, calls = torch.compile, []

    def counting(traced, inputs):
        calls.append(len(inputs))
        return traced.forward

    monkeypatch.setattr(torch, "compile", lambda model, mode, **how: compile(model, backend=counting, **how))
    nets = net_on(device), net_on(device)
    network, parameters = Graphed(nets[0]), list(nets[0].parameters())
    network.compiled.append(Compiled(nets[0], in_graphs=True))
    train(network, loader_of(32, 8, device), torch.optim.SGD(nets[0].parameters(), 0.01))
    assert by_graph == {True: 3, False: 1} and len(calls) == 1  # what is recorded is not compiled once more
    assert all(one is other for one, other in zip(parameters, nets[0].parameters(), strict=True))
    plain_loop(nets[1], loader_of(32, 8, device), torch.optim.SGD(nets[1].parameters(), 0.01))
    assert_same(*nets)
    utils.measure(network, loader_of(32, 8, device), F.cross_entropy, "auto")
    assert len(calls) == 1  # evaluation runs the modules


def test_no_graph_says_why(device):
    assert "Sequential" in Graphed(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).to(device)).reason
    assert "is a InstanceNorm2d" in Graphed(change(net_on(device), "another norm")).reason
    assert Graphed(net_on(device)).reason is None
    assert "is on meta" in Graphed(net_on(torch.device("meta"))).reason


def change(net, name):
    CHANGES[name](net)
    return net


def by_kernels(change, device, monkeypatch, norm="batch"):
    """Trains by stand-ins of the kernels, their results changed; returns the network, and what the loop alone has."""
    nets = net_on(device, norm), net_on(device, norm)

    def training_step(layers, images, labels):
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        with torch.enable_grad(), autocast(device, torch.bfloat16):
            logits = nets[0](images).float()
            loss = F.cross_entropy(logits, labels)
            gradients = torch.autograd.grad(loss, parameters)
        return change(nets[0], loss.detach(), (logits.argmax(1) == labels).sum(), list(gradients))

    monkeypatch.setattr(graph, "training_step", training_step)
    monkeypatch.setattr(graph, "reason_against", lambda *args: None)
    networks = Graphed(nets[0]), nets[1]
    for network, net in zip(networks, nets):
        train(network, loader_of(40, 8, device), torch.optim.SGD(net.parameters(), 0.01), precision="bfloat16")
    return networks


def fail(*step):
    raise RuntimeError("no C compiler")


def spoil(net, *step):
    net.C3.norm.running_var.fill_(-1.0)
    return step


WRONG = {
    "RuntimeError: no C compiler": fail,
    "the running statistics are not ": spoil,
    "a loss of nan in place of ": lambda net, loss, correct, each: (loss * torch.nan, correct, each),
    "-7 images are right in place of ": lambda net, loss, correct, each: (loss, correct * 0 - 7, each),
    "1 of 38 gradients are not ": lambda net, loss, correct, each: (loss, correct, [-each[0], *each[1:]]),
    "of 38 gradients are not ": lambda net, loss, correct, each: (loss, correct, [1.8 * one for one in each]),
}


@pytest.mark.parametrize("reason", WRONG)
def test_kernels_that_fail_or_are_wrong_give_way_to_the_modules(reason, device, by_graph, monkeypatch, capsys):
    network, net = by_kernels(WRONG[reason], device, monkeypatch)
    printed = capsys.readouterr().out
    assert printed.startswith("No Triton kernels, goes on with PyTorch's modules: ") and reason in printed
    assert reason in network.kernels_reason and network.reason is None and by_graph == {True: 4, False: 1}
    assert_same(network.model, net)


@pytest.mark.parametrize("norm", THREE)
def test_kernels_that_are_right_are_recorded(norm, device, by_graph, monkeypatch, capsys):
    network, net = by_kernels(lambda net, *step: step, device, monkeypatch, norm)
    assert network.kernels_reason is None and not capsys.readouterr().out and by_graph == {True: 4, False: 1}
    assert_same(network.model, net)
