"""The random numbers of nn.Dropout2d, as factors of whole maps."""

import torch


class DropoutScales:
    """Factors (N * K) for each block's output, 0 or 1 / (1 - p), of the numbers that its nn.Dropout2d would draw.

    scales: a block's factors, or None for all 1. Each draw() overwrites those of the one before.
    """

    def __init__(self, blocks, N, device="cpu"):
        self.drop = [block.dropout.p if block.dropout.training else 0 for block in blocks]
        self.scales = [None] * len(blocks)
        if any(self.drop):
            sizes = [N * block.conv._parameters["weight"].shape[0] for block in blocks]
            self.all = torch.empty(sum(sizes), dtype=torch.float32, device=device)
            self.parts = self.all.split(sizes)
            self.scales = [part if p else None for part, p in zip(self.parts, self.drop)]

    def draw(self):
        """Draws new factors, and returns scales."""
        if not any(self.drop):
            return self.scales
        for part, p in zip(self.parts, self.drop):
            if p:
                part.bernoulli_(1 - p) if p < 1 else part.zero_()
        kept = [1 - p or 1.0 for p in self.drop]
        if len({*kept}) == 1:  # in one call, as is usual
            self.all.div_(kept[0])
        else:
            torch._foreach_div_(self.parts, kept)
        return self.scales
