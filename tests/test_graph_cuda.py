"""CUDA graphs on a real GPU; test_graph.py tests what surrounds them everywhere."""

import pytest
import torch
from helpers import QUIET
from torch import nn

import model
import utils
from normkit.backend import Compiled, choose_backend, plain_model
from normkit.graph import Graphed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def test_the_backend_on_a_gpu():
    net = model.Net().cuda()
    network, line = choose_backend("auto", net)
    assert isinstance(network, Graphed) and plain_model(network) is net
    assert line == "CUDA graphs, in bfloat16 of Triton kernels, else of PyTorch's modules"
    assert choose_backend("auto", network)[0] is network
    assert choose_backend("eager", network)[0] is net
    compiled, line = choose_backend("compile", network)
    assert isinstance(compiled.compiled[0], Compiled) and line == "torch.compile, in CUDA graphs of whole steps"
    assert choose_backend("auto", compiled)[0] is compiled and plain_model(compiled) is net
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).cuda()
    network, line = choose_backend("auto", other)
    assert network is other and line.startswith("eager: PyTorch's modules (no CUDA graphs: the model is a Sequential")


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("recipe", ["classic", "best"])
def test_a_run_on_a_gpu_goes_on_from_its_checkpoint(backend, recipe, data, norm, tmp_path):
    how = {"recipe": recipe, "batch_size": 16, "device": "cuda", "backend": backend, **QUIET}
    whole = utils.run(norm, data, 3, checkpoint=tmp_path / "whole", **how).history

    def stop(history):
        if len(history) == 2:
            raise KeyboardInterrupt

    utils.run(norm, data, 3, checkpoint=tmp_path / "parts", on_epoch=stop, **how)
    parts = utils.run(norm, data, 3, checkpoint=tmp_path / "parts", **how).history
    for one, other in zip(whole, parts, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=2e-2)
        assert one["test_loss"] == pytest.approx(other["test_loss"], rel=5e-2)


@pytest.mark.slow
def test_a_compiled_step_in_a_graph_has_the_metrics_of_the_modules(norm, data):
    how = {"epochs": 2, "batch_size": 66, "device": "cuda", "dropout": 0, "precision": "float32", **QUIET}
    runs = [utils.run(norm, data.first(198, 66), backend=backend, **how).history for backend in ("compile", "eager")]
    for one, other in zip(*runs, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-2)


def test_a_closure_gets_labels_on_the_gpu(data):
    """Of a loader whose batches lie on the CPU, also where a graph has computed the first loss."""
    net = model.Net("group").cuda()
    batches = [(images.cpu(), labels.cpu()) for images, labels in utils.get_loaders(data, 66, device="cuda")[0]]
    metrics = utils.train(net, batches, torch.optim.LBFGS(net.parameters(), 0.01, max_iter=2), **QUIET)
    assert metrics.total == 198
