"""Saves the whole state of a run in one file of tensors and plain values, so that it resumes as if never stopped."""

import contextlib
import copy
import io
import itertools
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from normkit.files import is_whole, make_folder, read_state, to_bytes, write_state, write_whole

VERSION = 12  # of the file


class CheckpointRefused(ValueError):
    """Raised for a checkpoint that the run cannot resume from: damaged, or of another run or version."""


class Checkpoint:
    """A file for the state of a run, written after each epoch.

    path: the file. Its predecessor is kept as "<name>.previous", and is loaded if the file is damaged.
    parts: a dict from a name to an object with state_dict and load_state_dict, in loading order: containers after what
    they contain, and the random state last, as loading the others may draw from it.
    settings: a function that returns a dict from a name to text; a file with other settings is refused. A line that
    changed between the run's start and the save shows progress, not another run, and is not compared.
    lost: a function that returns, in words, what the parts may have lost when they were restored.
    """

    def __init__(self, path, parts, settings, lost=list):
        self.path, self.previous = files_of(path)
        self.parts, self.current_settings, self.lost = parts, settings, lost
        self.settings = self.settings_left = settings()  # left: by the last finished epoch and on_epoch
        self.check_place()
        self.check_state()

    def check_place(self):
        """Raises OSError if path cannot be written: now, rather than after the first epoch."""
        try:
            make_folder(self.path.parent)
        except OSError as error:
            raise OSError(f"no checkpoints can be written into {self.path.parent}: {error}") from None
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path} is a folder: name a file for the checkpoint")
        if self.path.exists() and not self.path.is_file():
            raise OSError(f"{self.path} is not a regular file: name another for the checkpoint")

    def check_state(self):
        """Raises TypeError where a part's state could not be read again."""
        for name, part in self.parts.items():
            state = part.state_dict()
            if readable_bytes(state) is None:
                keys = [str(key) for key, each in dict(state).items() if readable_bytes(each) is None]
                raise TypeError(
                    f"the state of the {name} ({type(part).__name__}) holds more than tensors, arrays and plain "
                    f"values, in {', '.join(keys)}, so no checkpoint can keep it: train without checkpoint="
                )

    def save(self, history):
        """Writes the state after an epoch; if that fails, prints so and leaves the last file as it is."""
        self.settings_left = self.current_settings()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"version": VERSION, "settings": self.settings, "history": list(history)}
        state["settings_now"] = state["settings_left"] = self.settings_left
        content = readable_bytes(state)
        if content is None:
            why = "a row of the history or the state of a part holds more than tensors and plain values"
            print(f"NO CHECKPOINT of epoch {len(history)}: {why}. Training goes on without.", flush=True)
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, content, self.previous if is_whole(self.path) else None)
        except OSError as error:
            print(f"NO CHECKPOINT of epoch {len(history)}: {error}. Training goes on without.", flush=True)

    def finish_epoch(self, history, on_epoch):
        """Writes the state after an epoch, calls on_epoch unless it is None, and notes the settings it leaves."""
        self.save(history)
        if on_epoch is not None:
            on_epoch(history)
            self.settings_left = self.current_settings()

    def note_settings(self):
        """Updates the file's settings with changes by on_epoch or an unfinished epoch, which make no other run."""
        with contextlib.suppress(OSError):  # a full disk or an unreadable file: what was written stays
            state = read_state(self.path) if self.path.is_file() else None
            if state is not None and state["settings"] == self.settings:
                moved = {"settings_now": self.current_settings(), "settings_left": self.settings_left}
                if any(state[name] != settings for name, settings in moved.items()):
                    write_state(self.path, state | moved)

    def restore(self, epochs):
        """Loads every part from the newest intact file; returns (history, path), or ([], None) if there is no file.

        Raises CheckpointRefused if files exist and none is intact, or the newest has other settings or more epochs.
        """
        damaged = []
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            state = read_state(path)
            if state is None:
                damaged.append(str(path))
                continue
            if path != self.path:
                why = "damaged" if damaged else "not there"
                print(f"{self.path} is {why}: going back to {path}, one epoch earlier", flush=True)
            self.compare(path, state)
            if (done := len(state["history"])) > epochs:
                advice = f"ask for as many, or name another file or delete {path}"
                raise CheckpointRefused(f"{path} holds {done} epochs, more than epochs={epochs}: {advice}")
            self.load(path, state)
            self.settings, self.settings_left = state["settings"], state["settings_left"]
            return state["history"], path
        if damaged:
            files = " and ".join(damaged)
            raise CheckpointRefused(
                f"{files} damaged, or never a checkpoint: name another file, or delete to start from the first epoch"
            )
        return [], None

    def call_again(self, history, on_epoch):
        """Calls on_epoch, if given, with the restored epochs; returns what it leaves unlike an uninterrupted run."""
        lost, before = self.lost(), self.unlike()
        if history and on_epoch is not None:
            on_epoch(history)
        return lost + (before and [each for each in self.unlike() if each in before])

    def unlike(self):
        """Returns the differences from the checkpoint's settings, one text per differing line."""
        now, left = self.current_settings(), self.settings_left
        sides = {name: (left[name].splitlines(), now[name].splitlines()) for name in now if name in left}
        return [
            f"{name} was {was.strip()!r} and is {found.strip()!r}"
            for name, lines in sides.items()
            for was, found in itertools.zip_longest(*lines, fillvalue="")
            # A generator's state is restored, whatever its seed; files opened during training are opened again.
            if was != found and not was.startswith("seed ") and found != "None"
        ]

    def load(self, path, state):
        """Brings every part to a state; where one does not fit, leaves all as they were and refuses."""
        try:
            with undone_on(Exception, self.parts):  # each kind of part has errors of its own
                with groups_kept(self.parts):
                    for name, part in self.parts.items():
                        if name not in state:
                            raise LookupError("it was made after the file was written")
                        load_state(part, state[name])
        except Exception as error:
            raise CheckpointRefused(
                f"{path} does not fit this run's {name}: {' '.join(str(error).split())}. Build all as it was, "
                f"with what on_epoch added; name another file; or delete {self.names()} to start from the first epoch"
            ) from error

    def names(self):
        """Returns the names of the files that are there, in words."""
        return " and ".join(path.name for path in (self.path, self.previous) if path.exists())

    def compare(self, path, state):
        """Raises CheckpointRefused with the first setting in which the file's run and this one differ."""
        if not isinstance(state, dict) or state.get("version") != VERSION:
            raise CheckpointRefused(
                f"{path} is no checkpoint of this version of the kit: name another file, or delete {self.names()}"
            )
        for name in self.settings | state["settings"]:
            sides = (state["settings"], state["settings_now"], self.settings)
            lines = (str(side.get(name)).splitlines() for side in sides)
            for saved, moved, actual in itertools.zip_longest(*lines, fillvalue=""):
                if saved != actual and moved == saved:
                    raise CheckpointRefused(
                        f"{path} is of another run: its {name} has {saved.strip()!r}, this one's {actual.strip()!r}. "
                        f"Name another file, or delete {self.names()} to start from the first epoch"
                    )


class NoCheckpoint:
    """Stands in for a Checkpoint where a run keeps none."""

    def restore(self, epochs):
        return [], None

    def save(self, history):
        pass

    def finish_epoch(self, history, on_epoch):
        if on_epoch is not None:
            on_epoch(history)

    def note_settings(self):
        pass


@contextlib.contextmanager
def undone_on(errors, parts):
    """Gives parts, by name, their states back where the block raises one of these errors."""
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    try:
        yield
    except errors:
        with groups_kept(parts):
            for name, part in parts.items():
                load_state(part, before[name])
        raise


def load_state(part, state):
    """Brings a part to a state, a module also where its buffers have other shapes, as they may grow."""
    if isinstance(part, nn.Module):
        for name, buffer in list(part.named_buffers()):
            if name in state and state[name].shape != buffer.shape:
                prefix, _, own = name.rpartition(".")
                setattr(part.get_submodule(prefix), own, state[name].to(buffer.device, copy=True))
    part.load_state_dict(state)


@contextlib.contextmanager
def groups_kept(parts):
    """Makes optimizers among parts load states into their existing param_groups, which wrappers may share.

    torch's load_state_dict replaces the groups: a rate set on a wrapper would no longer reach the optimizer inside.
    """
    with contextlib.ExitStack() as hooks:
        for part in parts.values():
            if isinstance(part, Optimizer) and hasattr(part, "_optimizer_load_state_dict_post_hooks"):  # as torch's do
                hooks.enter_context(part.register_load_state_dict_post_hook(keep_groups(part), prepend=True))
        yield


def keep_groups(optimizer):
    """Returns a post-hook that keeps an optimizer's present group and state dicts, and fills in the loaded values."""
    own = vars(optimizer)
    groups, state, each = own["param_groups"], own["state"], list(own["param_groups"])

    def keep(optimizer):
        for held, loaded in zip([state, *each], [own["state"], *own["param_groups"]]):
            if held is not loaded:
                held.clear()
                held.update(loaded)
        groups[:] = each
        own.update(param_groups=groups, state=state)

    return keep


def files_of(path):
    """Returns where a checkpoint is, and where the one before it is kept."""
    try:
        path = Path(path).expanduser().resolve()  # of a link, where it leads; wherever this process goes
    except TypeError:
        raise TypeError(f"checkpoint is {path!r}: expected a file's name, as text or Path") from None
    return path, path.with_name(path.name + ".previous")


def readable_bytes(state):
    """Returns a state as a file's bytes, or None if it holds more than tensors, arrays and plain values."""
    try:
        content = to_bytes(state)
        return content if read_state(io.BytesIO(content)) is not None else None
    except Exception:  # whatever pickle or torch says of a user-defined object
        return None


def settings_in(path):
    """Returns the settings of the run that a checkpoint file keeps, or {}."""
    for file in files_of(path):
        state = read_state(file) if file.is_file() else None
        if isinstance(state, dict) and isinstance(state.get("settings"), dict):
            return state["settings"]
    return {}
