"""Draws the random numbers of nn.Dropout2d, as a factor for each map."""

import torch


class DropoutScales:
    """Draws each block's dropout factors (N * K,), 0 or 1 / (1 - p), from the numbers that its nn.Dropout2d would draw.

    p and the mode are read once, here. scales: each block's factors, or None for all 1; draw() overwrites them.
    """

    def __init__(self, blocks, N, device="cpu"):
        drop = [block.dropout.p if block.dropout.training else 0 for block in blocks]
        sizes = [N * block.conv._parameters["weight"].shape[0] for block in blocks]
        self.drawn = torch.empty(sum(sizes) if any(drop) else 0, dtype=torch.float32, device=device)
        parts = self.drawn.split(sizes) if any(drop) else [None] * len(blocks)
        self.parts = [(part, p, 1 - p or 1.0) for part, p in zip(parts, drop) if p]
        self.kept = {kept for _, _, kept in self.parts}
        self.scales = [part if p else None for part, p in zip(parts, drop)]

    def draw(self):
        """Draws new factors, and returns scales."""
        for part, p, _ in self.parts:
            part.bernoulli_(1 - p) if p < 1 else part.zero_()
        if len(self.kept) == 1:  # one p in all blocks, as is usual: one call
            self.drawn.div_(*self.kept)
        elif self.parts:
            torch._foreach_div_([part for part, _, _ in self.parts], [kept for _, _, kept in self.parts])
        return self.scales
