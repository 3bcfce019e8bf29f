"""The random numbers of nn.Dropout2d, as factors of whole maps."""

import torch


class DropoutScales:
    """Factors (N * K) for the output of each block, 0 or 1 / (1 - p), of the numbers that its nn.Dropout2d would draw.

    p and the mode are those of now. scales: each block's factors, or None for all 1; a draw overwrites the last one's.
    """

    def __init__(self, blocks, N, device="cpu"):
        drop = [block.dropout.p if block.dropout.training else 0 for block in blocks]
        sizes = [N * block.conv._parameters["weight"].shape[0] for block in blocks]
        self.drawn = torch.empty(sum(sizes) if any(drop) else 0, dtype=torch.float32, device=device)
        parts = self.drawn.split(sizes) if any(drop) else []
        self.parts = [(part, p, 1 - p or 1.0) for part, p in zip(parts, drop) if p]
        self.kept = {kept for _, _, kept in self.parts}
        self.scales = [part if p else None for part, p in zip(parts, drop)] or [None] * len(blocks)

    def draw(self):
        """Draws new factors, and returns scales."""
        for part, p, _ in self.parts:
            part.bernoulli_(1 - p) if p < 1 else part.zero_()
        if len(self.kept) == 1:  # in one call, as is usual
            self.drawn.div_(*self.kept)
        elif self.parts:
            torch._foreach_div_([part for part, _, _ in self.parts], [kept for _, _, kept in self.parts])
        return self.scales
