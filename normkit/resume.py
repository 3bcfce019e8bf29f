"""All that is set back where an epoch fails, and that a resumed run goes on from."""

from functools import partial

from normkit.checkpoint import Checkpoint, undone_on
from normkit.checks import check_weights, not_lazy
from normkit.device import place_of
from normkit.identity import settings_of
from normkit.optim import gradients_of, hooks_of
from normkit.stateful import RandomState, epoch_takers, states_in


class TrainingState:
    """Finds what has a state in a training: its parts, on_epoch, and what these hold or name."""

    def __init__(self, model, optimizer, scheduler, criterion, train_loader, test_loader, on_epoch):
        self.model, self.optimizer, self.scheduler, self.criterion = model, optimizer, scheduler, criterion
        self.loaders = {"loader": train_loader, "test_loader": test_loader}
        self.roots = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "criterion": criterion}
        self.roots |= {"on_epoch": on_epoch, "hooks": hooks_of(optimizer)}
        self.parts = states_in(self.loaders, **self.roots) | gradients_of(optimizer)

        self.epoch_takers = epoch_takers(train_loader)

    def set_epoch(self, epoch):
        """Tells the training loader, and its samplers, which epoch comes next, from 0."""
        for each in self.epoch_takers:
            each.set_epoch(epoch)

    def undone_on(self, *errors):
        """Returns a context that gives the parts their states back where one of the errors is raised in it."""
        return undone_on(errors, not_lazy(self.parts))

    def checkpoint(self, path, scheduler_step, precision):
        """Returns a Checkpoint of the parts, the random state, and what else changes in the loaders and on_epoch.

        Raises ValueError if the model has lazy parameters.
        """
        check_weights(self.model)
        device, _, compute_dtype = place_of(self.model, self.loaders["loader"], precision)
        self.random_state = RandomState(device, list(self.parts), **self.loaders | self.roots | self.parts)
        made_of = (self.model, self.optimizer, self.scheduler, self.loaders, self.criterion)
        settings = partial(settings_of, *made_of, scheduler_step, compute_dtype)
        return Checkpoint(path, self.random_state.around(self.parts), settings)
