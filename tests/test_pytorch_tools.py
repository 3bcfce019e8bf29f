"""PyTorch's tools on the network and on what run returns: they work as on any nn.Module."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers import same, stand_in
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import model
import utils

pytestmark = pytest.mark.usefixtures("float32_by_default")

NORMS = list(model.NORMS)
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(4)


@pytest.fixture(scope="module", params=NORMS)
def trained(request, data):
    """What run returns after one short epoch in the kernel, where there is one."""
    return utils.run(request.param, data, 1, 110, device="cpu", dropout=0, progress=False).model


@pytest.fixture
def net(trained):
    return copy.deepcopy(trained)


def test_run_returns_the_ordinary_memory_format(net):
    for name, tensor in net.state_dict().items():
        assert tensor.is_contiguous() and tensor.device.type == "cpu", name
        assert tensor.stride() == torch.empty(tensor.shape).stride(), name
    assert type(net) is model.Net and all(p.requires_grad and p.is_leaf for p in net.parameters())


@pytest.mark.parametrize("memory_format", ["auto", "contiguous", "channels_last"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_run_returns_the_ordinary_memory_format_however_it_trained(data, memory_format, backend):
    how = {"memory_format": memory_format, "backend": backend, "device": "cpu", "progress": False}
    net = utils.run("group", data.first(60, 20), 1, 30, **how).model
    assert all(p.stride() == torch.empty(p.shape).stride() for p in net.parameters())


def test_saved_and_loaded(net, tmp_path):
    torch.save(net, tmp_path / "whole.pt")
    torch.save(net.state_dict(), tmp_path / "state.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh = model.Net(net.norm)
    fresh.load_state_dict(state)
    for other in (again, fresh):
        assert torch.equal(other.eval()(IMAGES), net.eval()(IMAGES))


def test_safetensors(net, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(net.state_dict(), tmp_path / "net.safetensors")
    state = safetensors.load_file(tmp_path / "net.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())


def test_prune_and_parametrize(net):
    prune.l1_unstructured(net.C4.conv, "weight", 0.5)
    assert (net.C4.conv.weight == 0).float().mean() == 0.5
    kept = net.C4.conv.weight.detach().clone()
    parametrizations.weight_norm(net.C8.conv)
    parametrizations.spectral_norm(net.C9.conv)
    F.cross_entropy(net.train()(IMAGES), LABELS).backward()
    assert torch.equal(net.C4.conv.weight, kept)
    assert net.C8.conv.parametrizations.weight.original0.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["C4", "C4.conv", "C4.norm", "C4.dropout", "c3", "P1", "GAP", "C10"])
@pytest.mark.parametrize("mode", [True, False])
def test_what_a_forward_hook_keeps_stays_as_it_was(net, name, mode):
    kept = {}
    module = net.get_submodule(name)
    module.register_forward_hook(lambda m, args, output: kept.update(input=args[0], output=output, copy=output.clone()))
    with torch.no_grad():
        net.train(mode)(IMAGES)
        assert torch.equal(kept["output"], kept["copy"])
        if name == "C4.norm":
            assert kept["output"].min() < 0  # before the ReLU
        if name == "C4.dropout":
            assert kept["output"].min() == 0


def test_a_hook_can_change_what_passes(net):
    net.eval().C4.norm.register_forward_hook(lambda m, args, output: torch.zeros_like(output))
    with torch.no_grad():
        x = net.P1(net.c3(net.C2(net.C1(IMAGES))))
        c3 = net.C3(x)
        x = net.C5(torch.zeros_like(c3), skip=c3)
        c7 = net.C7(net.P2(net.c6(x)))
        expected = net.C10(net.GAP(net.C9(net.C8(c7), skip=c7))).flatten(1)
        assert torch.equal(net(IMAGES), expected)


def test_backward_hooks_see_the_gradients(net):
    sizes = []
    for name, module in net.train().named_modules():
        if name:
            module.register_full_backward_hook(lambda m, into, outof: sizes.append(outof[0].norm().item()))
    F.cross_entropy(net(IMAGES), LABELS).backward()
    assert len(sizes) == len(list(net.modules())) - 1 and all(size > 0 for size in sizes)


def test_flops_are_counted(net):
    counts = []
    for each in (net, model.Net(net.norm)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            each.eval()(IMAGES)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 4 * 9_847_104  # multiplications and additions, four images


def test_features_by_torch_fx(net):
    features = create_feature_extractor(net.eval(), {"C9": "features", "C4": "middle"})
    with torch.no_grad():
        found = features(IMAGES)
    assert found["features"].shape == (4, 32, 8, 8) and found["middle"].shape == (4, 32, 16, 16)
    graph = torch.fx.symbolic_trace(net)
    assert torch.equal(graph(IMAGES), net(IMAGES))
    with pytest.raises(ValueError, match="expected \\(N, 3, H, W\\)"):
        graph(IMAGES[..., :30])


def test_export(net):
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(net.eval(), (IMAGES,), dynamic_shapes={"images": {0: batch}})
    for n in (1, 4):
        torch.testing.assert_close(exported.module()(IMAGES[:n]), net(IMAGES[:n]))
    batches = [(IMAGES, LABELS), (IMAGES[:1], LABELS[:1])]
    torch.testing.assert_close(utils.predict(exported.module(), batches), utils.predict(net, batches))
    assert utils.test(exported.module(), batches).accuracy == utils.test(net, batches).accuracy
    with pytest.raises(NotImplementedError, match="train"):
        utils.train(exported.module(), batches, torch.optim.SGD(exported.module().parameters(), 0.1), progress=False)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:FutureWarning")
def test_a_trace(net):
    traced = torch.jit.trace(net.eval(), IMAGES)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    assert torch.allclose(torch.jit.load(buffer)(IMAGES), net(IMAGES), atol=1e-5)


def loss_of(net, parameters, buffers, image, label):
    logits = functional_call(net, (parameters, buffers), (image[None],))
    return F.cross_entropy(logits, label[None])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_script(net, data):
    scripted = torch.jit.script(net)
    assert torch.equal(scripted.eval()(IMAGES), net.eval()(IMAGES))
    with pytest.raises(torch.jit.Error, match="expected \\(N, 3, H, W\\)"):
        scripted(IMAGES[:, :2])
    loaders = utils.get_loaders(data, 64, device="cpu")
    before = {name: value.clone() for name, value in scripted.state_dict().items()}
    optimizer = torch.optim.SGD(scripted.parameters(), 1e20)
    with pytest.raises(FloatingPointError, match="at learning rate 1e\\+20; first seen in the network"):
        utils.fit(scripted, *loaders, optimizer, epochs=1, progress=False)
    assert same(scripted.state_dict(), before)


def test_gradients_of_single_images_by_torch_func(net):
    images = IMAGES.double()  # in float32 a rounded zero may fall on either side of a ReLU
    net.eval().double()
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    each = vmap(grad(loss_of, 1), (None, None, None, 0, 0))(net, parameters, buffers, images, LABELS)
    F.cross_entropy(net(images), LABELS).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(each[name].mean(0), parameter.grad, rtol=1e-7, atol=1e-10)


def test_an_ensemble_by_vmap():
    nets = [model.Net("batch").eval() for _ in range(3)]
    state = stack_module_state(nets)
    base = copy.deepcopy(nets[0]).to("meta")
    call = vmap(lambda parameters, buffers: functional_call(base, (parameters, buffers), (IMAGES,)))
    for logits, each in zip(call(*state), nets):
        torch.testing.assert_close(logits, each(IMAGES), atol=1e-4, rtol=1e-4)


def test_forward_mode_and_reverse_mode_agree(net):
    net.eval().double()
    image, tangent = IMAGES[:1].double(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with forward_ad.dual_level():
        output = net(forward_ad.make_dual(image, tangent))
        forward = forward_ad.unpack_dual(output).tangent
    backward = torch.einsum("nkichw,ichw->nk", jacrev(net)(image), tangent)
    torch.testing.assert_close(forward, backward)


def test_second_derivatives(net):
    images = IMAGES.clone().requires_grad_()
    loss = F.cross_entropy(net.train()(images), LABELS)
    (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
    (loss + gradient.square().sum()).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    net.double().eval()
    small = IMAGES[:1, :, :8, :8].double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: net(x).logsumexp(1), small, atol=1e-3, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_default_dtype_is_nobodys_business(net, data, dtype):
    loader = utils.get_loaders(data, 50, device="cpu")[1]
    net.eval()
    before, metrics = net(IMAGES), utils.test(net, loader)
    torch.set_default_dtype(dtype)
    try:
        fresh = utils.get_loaders(data, 50, device="cpu")[1]
        assert torch.equal(net(IMAGES), before)
        assert utils.test(net, fresh) == metrics
        assert next(iter(fresh))[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_float64_networks_are_trained_as_they_are(data):
    torch.set_default_dtype(torch.float64)
    try:
        result = utils.run("group", data.first(60, 20), 1, 30, device="cpu", progress=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.model.C1.conv.weight.dtype == torch.float64
    assert 2 < result.history[0]["train_loss"] < 3


def test_a_network_on_the_meta_device_is_made_real(net):
    with torch.device("meta"):
        empty = model.Net(net.norm)
    assert empty(IMAGES.to("meta")).shape == (4, 10)
    real = empty.to_empty(device="cpu")
    real.load_state_dict(net.state_dict())
    assert torch.equal(real.eval()(IMAGES), net.eval()(IMAGES))


def test_fake_tensors(net):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        logits = net(mode.from_tensor(IMAGES))
        assert logits.shape == (4, 10)
        with torch.device("cuda:1"):
            on_gpu = model.Net(net.norm)
            assert on_gpu(torch.empty(4, 3, 32, 32)).device == torch.device("cuda:1")


def test_channels_last_networks(net):
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last.eval()(IMAGES), net.eval()(IMAGES), rtol=1e-4, atol=1e-5)


OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch_trains_the_network(name, backend):
    if name in ("SparseAdam", "Muon"):
        pytest.skip("for sparse gradients, or for matrices alone")
    torch.manual_seed(0)
    net = model.Net("group", dropout=0)
    optimizer = OPTIMIZERS[name](net.parameters(), lr=2e-4)
    loader = utils.get_loaders(stand_in(24, 10), 24, device="cpu")[0]
    losses = [utils.train(net, loader, optimizer, backend=backend, progress=False).loss for _ in range(3)]
    assert losses[2] < losses[0] and all(p.isfinite().all() for p in net.parameters())


def test_torchs_muon_trains_the_matrices_of_a_model(data):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("not in this torch")
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10, bias=False))
    loader = utils.get_loaders(data, 110, device="cpu")[0]
    assert utils.train(net, loader, torch.optim.Muon(net.parameters()), progress=False).total == 198


def test_the_kits_loop_and_a_plain_one_agree_on_a_plain_dataloader(data):
    images, labels = (torch.cat(parts) for parts in zip(*utils.get_loaders(data, 64, device="cpu")[1]))
    loader = DataLoader(TensorDataset(images, labels), 50)
    losses = []
    for own in (True, False):
        torch.manual_seed(0)
        net = model.Net("batch", dropout=0)
        optimizer = torch.optim.SGD(net.parameters(), 0.01, 0.9)
        if own:
            utils.train(net, loader, optimizer, precision="float32", backend="eager", progress=False)
        else:
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
        losses.append(net.state_dict())
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])
