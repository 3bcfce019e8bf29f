"""All that is set back where an epoch fails, and that a resumed run goes on from."""

from functools import partial

from torch import nn
from torch.nn.parameter import is_lazy

from normkit.checkpoint import Checkpoint, NoCheckpoint, undone_on
from normkit.device import place_of
from normkit.identity import settings_of
from normkit.optim import gradients_of, hooks_of
from normkit.stateful import CheckpointParts, epoch_takers, states_in


class TrainingState:
    """Finds what has a state in a training: what is trained, on_epoch, and what these hold or name."""

    def __init__(self, model, optimizer, scheduler, criterion, train_loader, test_loader, on_epoch):
        self.trained = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "criterion": criterion}
        self.loaders = {"loader": train_loader, "test_loader": test_loader}
        self.roots = self.trained | {"on_epoch": on_epoch, "hooks": hooks_of(optimizer)}
        self.parts = states_in(self.loaders, **self.roots) | gradients_of(optimizer)
        self.epoch_takers = epoch_takers(train_loader)

    def set_epoch(self, epoch):
        """Tells the training loader, and its samplers, which epoch comes next, from 0."""
        for each in self.epoch_takers:
            each.set_epoch(epoch)

    def undone_on(self, *errors):
        """Returns a context that gives the parts their states back where one of the errors is raised in it."""
        return undone_on(errors, {name: part for name, part in self.parts.items() if not lazy_in(part)})

    def checkpoint(self, path, scheduler_step, precision):
        """Returns a Checkpoint of the parts, the random state, and what else changes in the loaders and on_epoch.

        Returns a NoCheckpoint if path is None. Raises ValueError if the model has lazy parameters.
        """
        if path is None:
            return NoCheckpoint()
        model = self.trained["model"]
        if lazy := lazy_in(model):
            advice = "call the model once, then use checkpoint="
            raise ValueError(f"{lazy[0]} has no shape before the first batch: {advice}")
        device, _, compute_dtype = place_of(model, self.loaders["loader"], precision)
        kept = CheckpointParts(self.parts, device, **self.loaders | self.roots)
        how = {"scheduler_step": scheduler_step, "compute_dtype": compute_dtype}
        settings = partial(settings_of, **self.trained, loaders=self.loaders, **how)
        return Checkpoint(path, kept.parts, settings, kept.lost)


def lazy_in(part):
    """Returns the names of a module's lazy parameters, whose shapes the first batch sets."""
    named = part.named_parameters() if isinstance(part, nn.Module) else ()
    return [name for name, parameter in named if is_lazy(parameter)]
