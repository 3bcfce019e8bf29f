"""Training steps of the kernel that share memory and addresses compute what new ones do."""

import pytest
import torch
import torch.nn.functional as F
from helpers import THREE

import model
from normkit.fused import FusedLoss, fuse, loss
from normkit.fused.build import library
from normkit.stepper import Stepper

pytestmark = pytest.mark.skipif(library().reason is not None, reason=f"no kernel: {library().reason}")
IMAGES, LABELS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)


def step(fast, net, images=IMAGES, labels=LABELS):
    """Returns the loss of a batch and the gradients, as they are; None for the loss where the kernel stood back."""
    value, _ = fast.forward(images, labels)
    net.zero_grad()
    fast.backward()
    return value, [each.grad for each in net.parameters()]


def test_what_a_thread_changes_is_seen_after_some_batches():
    net = model.Net("group")
    fast = FusedLoss(fuse(net), F.cross_entropy, torch.float32, undisturbed=True)
    step(fast, net)
    net.C4.conv.weight.register_hook(print)
    losses = [step(fast, net)[0] for _ in range(loss.KEPT_FOR + 1)]
    assert losses[-1] is None and None not in losses[:-1]


def test_gradients_follow_weights_that_a_thread_has_laid_out_anew():
    net = model.Net("group")
    fast = FusedLoss(fuse(net), F.cross_entropy, torch.float32, undisturbed=True)
    for _ in range(3):
        step(fast, net)
    for each in net.parameters():
        each.data = each.data.contiguous(memory_format=torch.channels_last) if each.dim() == 4 else each.data
    for _ in range(loss.KEPT_FOR):
        _, gradients = step(fast, net)
    assert [each.stride() for each in gradients] == [each.stride() for each in net.parameters()]


def test_weights_are_read_where_a_thread_has_put_them():
    net = model.Net("batch", dropout=0)
    reusing, new = (FusedLoss(fuse(net), F.cross_entropy, torch.float32, undisturbed=each) for each in (True, False))
    for tensor in (net.C4.conv.weight, net.C8.norm.running_var):
        for _ in range(3):
            step(reusing, net)
        tensor.data = 2 * tensor
        before = net.C8.norm.running_var.clone()
        losses, after = [], []
        for fast in (new, reusing):
            net.C8.norm.running_var.copy_(before)
            losses.append(step(fast, net)[0].clone())
            after.append(net.C8.norm.running_var.clone())
        assert losses[0] == losses[1] and torch.equal(*after) and not torch.equal(after[0], before)


def test_a_step_of_another_batch_size_has_memory_of_its_own():
    net = model.Net("group")
    reusing, new = (FusedLoss(fuse(net), F.cross_entropy, torch.float32, undisturbed=each) for each in (True, False))
    for N in (4, 3, 4, 4, 1, 3, 3, 3):
        results = []
        for fast in (reusing, new):
            torch.manual_seed(N)
            loss, gradients = step(fast, net, IMAGES[:N], LABELS[:N])
            results.append([loss.clone(), *(each.clone() for each in gradients)])
            del gradients
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("norm", THREE)
def test_gradients_are_written_to_two_places_in_turn_and_are_those_of_new_ones(norm):
    net = model.Net(norm, dropout=0.2)
    places = set()
    reusing, new = (FusedLoss(fuse(net), F.cross_entropy, torch.float32, undisturbed=each) for each in (True, False))
    for i in range(5):
        images = IMAGES * (i + 1)
        torch.manual_seed(i)
        expected = [each.clone() for each in step(new, net, images)[1]]
        torch.manual_seed(i)
        gradients = step(reusing, net, images)[1]
        assert all(map(torch.equal, gradients, expected))
        places.add(gradients[0].data_ptr())
        del gradients
    assert len(places) == 2


def test_gradients_that_somebody_has_are_not_written_over():
    """A signal handler, say, which Python calls between any two lines."""
    net = model.Net("group")
    fast = FusedLoss(fuse(net), F.cross_entropy, torch.float32, undisturbed=True)
    step(fast, net)
    held = net.C10.bias.grad
    before = held.clone()
    for i in range(4):
        step(fast, net, IMAGES * i)
    assert torch.equal(held, before)


def test_gradients_that_add_up_are_not_written_over(monkeypatch):
    monkeypatch.setattr(loss, "are_held", lambda tensors: False)  # as older versions of PyTorch say of a .grad
    net = model.Net("group", dropout=0)
    fast = FusedLoss(fuse(net), F.cross_entropy, torch.float32, undisturbed=True)
    total = torch.zeros(10)
    for i in range(6):
        fast.forward(IMAGES * i, LABELS)
        for name, parameter in net.named_parameters():
            if name != "C10.bias":
                parameter.grad = None
        fast.backward()
        total += torch.autograd.grad(F.cross_entropy(net(IMAGES * i), LABELS), net.C10.bias)[0]
    torch.testing.assert_close(net.C10.bias.grad, total)


def test_labels_are_looked_at_in_each_batch():
    net = model.Net("group")
    fast = FusedLoss(fuse(net), F.cross_entropy, torch.float32, undisturbed=True)
    assert step(fast, net)[0] is not None
    assert step(fast, net, labels=LABELS + 7)[0] is None


def test_a_group_that_begins_to_learn_later_gets_momenta_of_its_own():
    kept, plain = ([torch.nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2))
    groups = ([{"params": [each]} for each in pair] for pair in (kept, plain))
    optimizers = [torch.optim.SGD(each, 0.1, momentum=0.9, fused=True) for each in groups]
    stepper = Stepper(optimizers[0], undisturbed=True)
    for batch in range(4):
        for always, later in (kept, plain):
            always.grad, later.grad = torch.ones(3), torch.ones(3) if batch > 1 else None
        stepper.step(None, None)
        optimizers[1].step()
        assert all(map(torch.equal, kept, plain))
