"""Runs a training step on CUDA in one launch: forward pass, loss and backward pass, recorded as a CUDA graph.

A step of the kit's network is some 300 small operations by PyTorch's modules, or 60 Triton kernels. Python takes seven
times as long to launch the former one by one as an H200 to run them.
"""

import collections
import contextlib
import itertools
import weakref

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from normkit.checks import in_words
from normkit.device import autocast
from normkit.fused.inspection import Inspection, tensors_of
from normkit.fused.legality import of_call, of_code
from normkit.fused.loss import are_classes, are_labels, are_nodes_kept, is_plain_step
from normkit.gpu.step import reason_against, training_step
from normkit.meter import count_correct

DEVICE = "cuda"  # the kind of device that graphs are for
MAX_GRAPHS = 4  # kept at a time, each with the memory of its activations
RECORDED = weakref.WeakSet()  # the networks that may have some


class Graphed(nn.Module):
    """Calls the model, or its compiled form, and keeps the CUDA graphs of its training steps for GraphedLoss.

    reason: why no graph can be recorded, or None. kernels_reason: why graphs have no Triton kernels, or None.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.training = getattr(model, "training", False)
        self.compiled = []  # one Compiled of the model, or none; in a list, as each parameter is to have one name alone
        self.graphs = collections.OrderedDict()  # the latest last; of None where there was one batch alone
        self.inspection = Inspection(model, DEVICE)
        self.reason = self.inspection.reason or next(of_code(), None)
        if self.reason is None and not torch.get_device_module(DEVICE).is_available():
            self.reason = "there is no CUDA device"
        self.kernels_reason = self.reason or reason_against(self.inspection.layers)
        self.told = {self.kernels_reason}

    def __getstate__(self):  # for copies and pickles, which make graphs of their own
        return self.__dict__ | {"inspection": None, "graphs": collections.OrderedDict()}

    def forward(self, images):
        compiled = self.compiled if self.training else []  # to compile evaluation takes longer than to evaluate
        return (compiled or [self.model])[0](images)

    def give_up(self, reason):
        """Goes on without graphs, and says why."""
        self.reason = reason
        self.graphs.clear()
        print(f"No CUDA graph, goes on step by step. {reason}", flush=True)

    def record(self, inspection, images, labels, dtype):
        """Returns a StepGraph for such batches, by the kernels or else by the modules; None where CUDA records none."""
        RECORDED.add(self)
        batch = (inspection, images, labels, dtype)
        if self.kernels_reason is None and not self.compiled and dtype == torch.bfloat16:
            reason = reason_against(inspection.layers, images, inspection.frozen)
            if reason is None:
                try:
                    return StepGraph(self, *batch, by_kernels=True)
                except Exception as error:  # Triton has errors of its own, as where it finds no C compiler
                    reason = in_words(error, 200)
                    if not isinstance(error, torch.OutOfMemoryError):  # a smaller batch may fit
                        self.kernels_reason = reason
            if reason not in self.told:
                print(f"No Triton kernels, goes on with PyTorch's modules: {reason}", flush=True)
            self.told.add(reason)
        try:
            return StepGraph(self, *batch, by_kernels=False)
        except Exception as error:  # CUDA, cuDNN and what compiled the model each have errors of their own
            return self.give_up(in_words(error, 200))

    def inspect(self):
        """Returns an Inspection of the network as it is now; graphs of what it was before are given up."""
        model = self.model
        if self.inspection is None or not self.inspection.is_current(model):
            self.graphs.clear()
            self.inspection = Inspection(model, DEVICE)
        return self.inspection


class GraphedLoss:
    """Computes a network's cross-entropy, and adds the gradients to the parameters' .grad, by a CUDA graph.

    The first batch of each shape runs without one, so that a loader whose batches all differ in size records nothing.
    If a graph might give another result, or a hook or tool observes the step, forward returns (None, None) and has no
    effect.
    """

    checked = True  # as of a FusedLoss: the conditions, for each batch

    def __init__(self, network, criterion, dtype):
        self.network, self.criterion, self.dtype, self.graph = network, criterion, dtype, None
        self.nodes_kept, self.labels_checked = are_nodes_kept(network.model), False

    def forward(self, images, labels):
        """Returns the mean loss and the number of correct images, for images (N, 3, H, W) and labels int64 (N,).

        Both are scalar tensors on the network's device; the next step overwrites them.
        """
        inspection = self.inspect(images, labels)
        self.graph = None if inspection is None else self.find_graph(inspection, images, labels)
        return (None, None) if self.graph is None else self.graph.launch(images, labels)

    @torch.no_grad()
    def backward(self):
        """Adds the gradients of forward's loss to .grad, and returns whether there was one."""
        if self.graph is None:
            return False
        graph, self.graph = self.graph, None
        # Copied, as the next step overwrites them; mul keeps the strides, which are the parameters', as autograd's are.
        gradients = torch._foreach_mul(graph.gradients, 1)
        for parameter, gradient in zip(graph.parameters, gradients):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return True

    def inspect(self, images, labels):
        """Returns the network's Inspection, or None where PyTorch has to compute the batch step by step."""
        network = self.network
        if network.reason is not None or self.nodes_kept:
            return None
        inspection = network.inspect()
        if inspection.reason is not None or next(itertools.chain(of_code(), of_call()), None) is not None:
            return None
        parameters = inspection.parameters
        fits = fits_graph(images, labels, parameters[0].device)
        if not fits or not is_plain_step(self.criterion, images, parameters):
            return None
        if labels.is_cpu or not self.labels_checked:  # on a GPU in the first batch alone, as one has to wait for it
            if not are_classes(labels, inspection.classes):
                return None
            self.labels_checked = True
        return inspection

    def find_graph(self, inspection, images, labels):
        """Returns the StepGraph of such a batch, or None where there is none yet, or can be none."""
        network = self.network
        graphs, key = network.graphs, (images.shape, images.stride(), self.dtype, backend_settings())
        seen, graph = key in graphs, graphs.pop(key, None)
        if graph is not None and not graph.is_current():
            if graph.launches < 2:
                return network.give_up("its tensors are replaced again and again")
            graph = None  # whose memory the next one may take
        if seen and graph is None:
            graph = network.record(inspection, images, labels, self.dtype)
            if graph is None:
                return None
        graphs[key] = graph
        while len(graphs) > MAX_GRAPHS:
            graphs.popitem(last=False)
        return graph


class StepGraph:
    """Records and launches a training step up to the gradients, for batches of one shape."""

    def __init__(self, network, inspection, images, labels, dtype, by_kernels):
        self.tensors = tensors_of(inspection.modules)
        self.addresses = addresses_of(self.tensors)
        self.images, self.labels, self.dtype = images.clone(), labels.to(images.device, copy=True), dtype
        self.launches = 0
        self.parameters = [each for each in dict.fromkeys(inspection.parameters) if each.requires_grad]
        compute = modules = self.by_modules(network)
        if by_kernels:
            compute = self.by_kernels(inspection)
            self.check(network, compute, modules)
        self.record(network, compute)

    def by_kernels(self, inspection):
        """Returns a function that computes the mean loss, how many images are right, and gradients."""

        def compute():
            loss, correct, gradients = training_step(inspection.layers, self.images, self.labels)
            sums = {}  # a parameter may be that of several layers
            for parameter, gradient in zip(inspection.parameters, gradients):
                sums[parameter] = sums[parameter] + gradient if parameter in sums else gradient
            return loss, correct, [sums[parameter] for parameter in self.parameters]

        return torch.no_grad()(compute)

    def by_modules(self, network):
        """Returns such a function that calls the network."""
        # Parameters of its own, in the same memory: autograd joins a recording with every stream on which a parameter
        # was used before, as long as somebody keeps a loss of that, and only what is recorded may be joined.
        aliases = {id(each): nn.Parameter(each.detach(), each.requires_grad) for each in network.parameters()}
        # Each module once, whatever its names: else functional_call would leave the aliases where it put them.
        named = {
            f"{name}.{part}": aliases[id(each)]
            for name, module in network.named_modules()
            for part, each in module._parameters.items()
            if each is not None
        }
        inputs = [aliases[id(each)] for each in self.parameters]

        def compute():
            with autocast(self.images.device, self.dtype):
                logits = functional_call(network, named, (self.images,), tie_weights=False).float()
            loss = F.cross_entropy(logits, self.labels)
            gradients = [
                gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)
                for parameter, gradient in zip(inputs, torch.autograd.grad(loss, inputs))
            ]
            return loss.detach(), count_correct(logits, self.labels), gradients

        return compute

    def check(self, network, compute, expected):
        """Raises ArithmeticError unless compute and expected agree on the batch, within bfloat16's rounding errors.

        A compiler may be wrong, and the kind of GPU untested. Tolerances are twice the difference between two
        computations of real batches in bfloat16, of the three norms, 1 to 64 images.
        """
        results = []
        for function in (compute, expected):
            with unchanged(network, self.images.device):
                results.append((*function(), [buffer.clone() for buffer in network.buffers()]))
        (loss, correct, gradients, buffers), (true_loss, true_correct, true_gradients, true_buffers) = results
        N = len(self.images)
        if not true_loss.isfinite():
            return  # training stops
        if not abs(loss - true_loss) <= 0.05 + 0.02 * true_loss:
            raise ArithmeticError(f"a loss of {loss.item():.4f} in place of {true_loss.item():.4f}")
        if not abs(correct - true_correct) <= 2 + N / 10:
            raise ArithmeticError(f"{correct.item():.0f} images are right in place of {true_correct.item():.0f}")
        largest = max(each.norm() for each in true_gradients)
        allowed = [(0.5 + 2 / N) * each.norm() + 0.03 * largest for each in true_gradients]
        wrong = are_further(gradients, true_gradients, allowed)
        if any(wrong):
            raise ArithmeticError(f"{sum(wrong)} of {len(wrong)} gradients are not those of the modules")
        allowed = [0.05 * (each.double().norm() + each.numel() ** 0.5) for each in true_buffers]
        if any(are_further(buffers, true_buffers, allowed)):
            raise ArithmeticError("the running statistics are not those of the modules")

    def record(self, network, compute):
        """Records a step; the weights, running statistics and the device's generator stay as they are."""
        device = self.images.device
        with unchanged(network, device):
            state = torch.cuda.get_rng_state(device)
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            try:
                with torch.cuda.stream(side):
                    for _ in range(2):  # so that what is set up at first use is there
                        compute()
                    self.capture(compute, side, state)
            finally:
                current.wait_stream(side)

    def capture(self, compute, stream, state):
        """Captures a step, which does not run it; other threads, such as a DataLoader's, may go on."""
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.loss, self.correct, self.gradients = compute()
        except BaseException:  # an interrupt, too
            replace_generator(self.images.device, state)
            raise

    def is_current(self):
        """Returns whether the tensors that were recorded are where they were, and the same of them are trained."""
        return self.addresses == addresses_of(self.tensors)

    def launch(self, images, labels):
        """Returns the loss of a batch and how many images are right, which the next one overwrites."""
        self.launches += 1
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.loss, self.correct


def are_further(tensors, others, distances):
    """Returns for each pair of tensors whether their distance exceeds its bound, or is not finite."""
    return [
        not bool((one.double() - other.double()).norm() <= distance)
        for one, other, distance in zip(tensors, others, distances, strict=True)
    ]


@contextlib.contextmanager
def unchanged(network, device):
    """Works on a device, and leaves a network's buffers and the device's random generator as they are."""
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device, torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for buffer, before in buffers:
                buffer.detach().copy_(before)


def replace_generator(device, state):
    """Gives the device a new random generator: after a failed capture, the old one still counts as captured.

    Graphs draw from the generator that they were recorded with, so all have to be recorded again.
    """
    generator = torch.Generator(device)
    generator.set_state(state)
    torch.cuda.default_generators[device.index].graphsafe_set_state(generator.graphsafe_get_state())
    for network in RECORDED:
        network.graphs.clear()


def addresses_of(tensors):
    return [(each.data_ptr(), each.requires_grad) for each in tensors if each is not None]


def fits_graph(images, labels, device):
    """Returns whether a batch suits a graph: float32 images on the device, labels int64 (N,) there or on the CPU."""
    return (
        type(images) is torch.Tensor
        and (images.dtype, images.device, images.layout) == (torch.float32, device, torch.strided)
        and not (images.is_neg() or images._is_zerotensor())
        and are_labels(labels, len(images))
        and (labels.is_cpu or labels.device == device)
    )


def backend_settings():
    """Returns what decides how PyTorch computes a step, beside the batch."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision, matmul.fp32_precision),
        (torch.are_deterministic_algorithms_enabled(), matmul.allow_bf16_reduced_precision_reduction),
    )
