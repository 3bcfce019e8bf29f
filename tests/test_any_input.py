"""Whatever users pass: right metrics, or one ValueError or TypeError of the kit's own."""

import numpy as np
import torch
import torch.nn.functional as F
from helpers import THREE
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import model
import utils
from normkit.cifar10 import MEAN, STD
from normkit.data import Data
from normkit.synthetic import make_synthetic

many = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
whole = st.integers(-3, 70)
numbers = st.one_of(whole, whole.map(np.int64), st.floats(), st.none(), st.text(max_size=2))
torch.manual_seed(0)
NET = model.Net("group", dropout=0)


def outcome(call):
    """The value of a call, or None where it refused; any other error is the test's."""
    try:
        return call()
    except (ValueError, TypeError) as error:
        assert str(error)
        event("refused")
        return None


@st.composite
def batches(draw):
    """A loader's batches, and whether they are what a network can take."""
    n, size = draw(st.integers(0, 5)), draw(st.sampled_from([4, 8, 10, 12]))
    shape = draw(st.sampled_from([(n, 3, size, size)] * 4 + [(n, size, size, 3), (3, size, size), (n, 1, size, size)]))
    dtype = draw(st.sampled_from([torch.float32] * 4 + [torch.float64, torch.bfloat16, torch.uint8, torch.int64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    images = (torch.rand(shape, generator=generator) * 4).to(dtype)
    low, high = draw(st.sampled_from([(0, 9)] * 4 + [(0, 0), (3, 12), (-2, 5)]))
    count = draw(st.sampled_from([n] * 5 + [n + 1]))
    labels = torch.randint(low, high + 1, (count,), generator=generator)
    labels = labels.to(draw(st.sampled_from([torch.int64] * 5 + [torch.float32, torch.int32])))
    if draw(st.integers(0, 9)) == 0:
        labels = draw(st.sampled_from([labels[:, None], labels.tolist(), None]))
    shares = draw(st.integers(0, 4)) == 0  # of the classes, as MixUp makes them
    if shares:
        classes = draw(st.sampled_from([10] * 4 + [1, 9]))
        labels = torch.rand(
            count, classes, generator=generator, dtype=draw(st.sampled_from([torch.float32, torch.float64]))
        )
        labels /= labels.sum(1, keepdim=True)
        spoilt = draw(st.sampled_from([None] * 4 + ["sum", "sign", "nan"]))
        if count and spoilt:
            labels[-1] *= 1.5 if spoilt == "sum" else 1
            labels[-1, 0] -= 0 if spoilt == "sum" else 2 if spoilt == "sign" else float("nan")
            labels[-1, -1] += 2 if spoilt == "sign" else 0
    fits = (
        n > 0
        and shape == (n, 3, size, size)
        and size in (8, 12)
        and dtype.is_floating_point
        and isinstance(labels, torch.Tensor)
        and (
            labels.shape == (n, 10) and not spoilt
            if shares
            else labels.dtype == torch.int64 and labels.shape == (n,) and 0 <= labels.min() and labels.max() <= 9
        )
    )
    return [(images, labels)] * draw(st.integers(0, 2)), fits


@many
@given(batches())
def test_metrics_are_right_or_refused(case):
    loader, fits = case
    metrics = outcome(lambda: utils.test(NET, loader, precision="float32"))
    optimizer = torch.optim.SGD(NET.parameters(), 0.0)
    trained = outcome(lambda: utils.train(NET, loader, optimizer, precision="float32", progress=False))
    assert (metrics is not None) == (trained is not None) == (fits and len(loader) > 0)
    if metrics is not None:
        images, labels = loader[0]
        with torch.no_grad():
            logits = NET(images.float())
        classes = labels.argmax(1) if labels.dim() > 1 else labels
        assert abs(metrics.loss - F.cross_entropy(logits, labels).item()) < 1e-5
        assert abs(metrics.loss - trained.loss) < 1e-4
        assert metrics.correct == trained.correct == len(loader) * int((logits.argmax(1) == classes).sum())
        assert metrics.total == trained.total == len(loader) * len(labels)


@many
@given(st.integers(1, 30), numbers, st.booleans(), st.integers(-5, 5))
def test_loaders_give_every_image_once_or_refuse(n, batch_size, augment, seed):
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 8, 8)
    data = Data("any", tuple(range(n)), images, torch.arange(n), images[:1], torch.zeros(1, dtype=torch.int64))
    loaders = outcome(lambda: utils.get_loaders(data, batch_size, augment, "cpu", seed))
    assert (loaders is not None) == (isinstance(batch_size, int | np.integer) and batch_size >= 1)
    if loaders is not None:
        parts = list(loaders[0])
        assert len(parts) == len(loaders[0]) and {len(labels) for _, labels in parts[:-1]} <= {batch_size}
        seen, labels = (torch.cat(side) for side in zip(*parts, strict=True))
        assert sorted(labels.tolist()) == list(range(n))
        values = (seen[:, 0] * STD[0] + MEAN[0]) * 255
        assert torch.allclose(values, labels.view(-1, 1, 1).expand_as(values).float(), atol=1e-3)


@many
@given(
    st.sampled_from([torch.uint8] * 4 + [torch.float32, torch.int64]),
    st.sampled_from([(5, 3, 8, 8)] * 4 + [(5, 8, 8, 3), (3, 8, 8), (0, 3, 8, 8)]),
    st.sampled_from([torch.int64] * 4 + [torch.uint8, torch.float32]),
    st.integers(0, 6),
    st.integers(-1, 12),
    st.integers(1, 10),
)
def test_data_is_checked(dtype, shape, label_dtype, count, label, classes):
    images, labels = torch.zeros(shape, dtype=dtype), torch.full((count,), label).to(label_dtype)
    data = outcome(lambda: Data("any", tuple(range(classes)), images, labels, images, labels))
    right = (
        dtype == torch.uint8 and len(shape) == 4 and shape[1] == 3 and label_dtype == torch.int64 and count == shape[0]
    )
    assert (data is not None) == (right and (count == 0 or 0 <= label < classes))


@many
@given(st.one_of(st.sampled_from(list(model.NORMS)), numbers), numbers, numbers)
def test_networks_have_their_parameters_or_are_refused(norm, num_groups, dropout):
    net = outcome(lambda: model.Net(norm, num_groups, dropout))
    if net is not None:
        assert norm in model.NORMS and 16 % num_groups == 0 and 0 <= dropout <= 1
        count = sum(p.numel() for p in net.parameters())
        assert count == 48_178 or norm not in THREE and count < 50_000


@many
@given(numbers, numbers, numbers, st.one_of(st.none(), st.text(max_size=4)), st.one_of(st.none(), st.text(max_size=4)))
def test_runs_refuse_before_they_train(norm, epochs, batch_size, device, precision):
    data = make_synthetic(10, 10)
    assert norm not in model.NORMS
    assert outcome(lambda: utils.run(norm, data, epochs, batch_size, device=device, precision=precision)) is None
