"""Runs a training step by the kernel alone: loss and gradients in one call, without autograd."""

import torch

from normkit.fused import params
from normkit.fused.dropout import DropoutScales
from normkit.fused.function import count_batch, running_stats
from normkit.fused.workspace import give_back, take_workspace


class TrainingStep:
    """Runs a Call with labels, for one batch or several, each of which overwrites the results of the last.

    gradients: a tensor for each parameter, of its shape and strides.
    """

    def __init__(self, call, parameters):
        plan, batch_size = call.plan, call.out_shape[0]
        self.call, self.structs = call, plan.structs.copy()
        self.norms, self.dropout = [block.norm for block in call.blocks], DropoutScales(call.blocks, batch_size)
        self.logits = torch.empty(call.out_shape, dtype=call.out_dtype, device="cpu")
        self.scores = torch.empty(2, dtype=torch.float32, device="cpu")
        self.gradients = [torch.empty_like(parameter) for parameter in parameters]
        statistics = running_stats(self.norms)
        params.set_addresses(self.structs, plan.inputs[1:], [*parameters, *self.dropout.scales])
        params.set_addresses(self.structs, plan.outputs, [self.logits, *statistics])
        params.set_addresses(self.structs, plan.gradients, [None, None, *self.gradients])
        self.tensors = [each for each in [*parameters, *statistics] if each is not None]
        self.addresses = self.find_addresses()

    def is_current(self, call):
        """Returns whether the step is of that Call, and the network's tensors have not moved in memory."""
        return call is self.call and self.find_addresses() == self.addresses

    def find_addresses(self):
        return list(map(torch.Tensor.data_ptr, self.tensors))

    def run(self, images, labels):
        """Returns the mean cross-entropy and the number of correct images, both scalars; writes the gradients.

        images: float32 (N, 3, H, W), contiguous. labels: int64 (N,), each from 0 to K - 1.
        """
        plan, labels, workspace = self.call.plan, labels.contiguous(), take_workspace(self.call.plan.step_bytes)
        params.set_addresses(self.structs, plan.inputs[:1], [images])
        self.dropout.draw()
        count_batch(self.norms)
        plan.step(self.structs.ctypes.data, labels.data_ptr(), self.scores.data_ptr(), workspace.data_ptr())
        give_back(workspace)
        return self.scores.unbind()
