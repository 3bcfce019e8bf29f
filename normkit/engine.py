"""Runs many tasks on joblib's active backend: processes of this machine, a dask cluster, Ray."""

import contextlib
import functools
import pickle
import queue
import sys
import warnings

import cloudpickle
import numpy as np
from joblib import Parallel, delayed, effective_n_jobs, parallel_config
from joblib.parallel import get_active_backend

from normkit.objects import is_library


def compute(function, tasks, data, processes=1):
    """Yields (key, result, error) of each task as it ends: the result of function(data, *arguments), or the error.

    tasks: a dict from a key to arguments. processes: how many on this machine, unless joblib.parallel_config names
    another backend. data is sent once per worker; on Ray, once per task.
    A task that kills its process may take others with it. Lost tasks are retried in halves, until the one at fault
    is alone: it alone has an error.
    """
    left = dict(tasks)
    backend, _ = get_active_backend()
    try:
        results = on_dask(backend, function, tasks, data) if hasattr(backend, "client") else None
        for key, result in results or on_joblib(backend, function, tasks, data, processes):
            del left[key]
            yield key, result, None
    except Exception as error:  # of the engine: a worker that died, a task that cannot be sent
        if len(tasks) == 1:
            yield from ((key, None, error) for key in left)
            return
    keys = list(left)
    for half in (keys[: len(keys) // 2], keys[len(keys) // 2 :]):
        if half:
            yield from compute(function, {key: tasks[key] for key in half}, data, processes)


def on_dask(backend, function, tasks, data):
    """Yields (key, result) of each task on the cluster of a dask.distributed client; then raises, if any was lost.

    joblib's own dask backend hangs if a task kills its workers, computes in this process if the cluster has one
    worker, and loses the data with the only worker that holds it.
    """
    client = backend.client
    with warnings.catch_warnings():  # the data is a task's result, not scattered, so dask remakes it if a worker dies
        warnings.filterwarnings("ignore", "Sending large graph")
        data = client.submit(pickle.loads, pickle.dumps(data), pure=False)
    waiting, ended, lost = set(), queue.SimpleQueue(), None
    try:
        for key, arguments in tasks.items():
            future = client.submit(call, key, function, data, arguments, pure=False, **backend.submit_kwargs)
            waiting.add(future)
            future.add_done_callback(ended.put)
        while waiting:
            future = ended.get()
            waiting.remove(future)
            try:
                result = future.result()
            except Exception as error:
                lost = error
            else:
                future.release()  # or it would be computed again if its worker died later
                yield result
    finally:
        client.cancel(list(waiting))
    if lost is not None:
        raise lost


def on_joblib(backend, function, tasks, data, processes):
    """Yields (key, result) of each task on joblib's active engine, or in processes of one thread each."""
    context, n_jobs = contextlib.nullcontext(), None  # as the caller's parallel_config says, or one after the other
    if processes != 1:
        n_jobs = processes
        if backend.supports_inner_max_num_threads:  # loky
            context = parallel_config("loky", inner_max_num_threads=backend.inner_max_num_threads or 1)
    with context:
        workers = effective_n_jobs(n_jobs)
        if workers > 1:
            data = np.frombuffer(pickle.dumps(data), np.uint8)  # which joblib maps into the memory of all workers
        jobs = [delayed(call)(key, function, data, arguments) for key, arguments in tasks.items()]
        if backend.supports_return_generator:
            yield from Parallel(n_jobs, return_as="generator_unordered", batch_size=1)(jobs)
        else:  # all results of a call come at once, so that it has one task for each worker
            for start in range(0, len(jobs), workers):
                yield from Parallel(n_jobs, batch_size=1)(jobs[start : start + workers])


def call(key, function, data, arguments):
    """Returns (key, function(data, *arguments)); data may be an array of its pickle's bytes."""
    return key, function(pickle.loads(data) if isinstance(data, np.ndarray) else data, *arguments)


class ByValue:
    """Wraps a function or class so that it is pickled by value, with its code and that of its module.

    Pickled by name, as is usual, it would be what the other process read from its file, or missing there.
    content: the pickle, loaded each time that value is read, against the modules loaded by then.
    """

    def __init__(self, value=None, content=None):
        self.held, self.content = value, content

    @property
    def value(self):
        return self.held if self.content is None else pickle.loads(self.content)

    def __reduce__(self):
        return ByValue, (None, self.content or self.pack())

    def pack(self):
        function = self.held
        while isinstance(function, functools.partial):
            function = function.func
        module = sys.modules.get(getattr(function, "__module__", type(function).__module__))
        if module is None or not is_user_module(module):
            return cloudpickle.dumps(self.held)
        cloudpickle.register_pickle_by_value(module)
        try:
            return cloudpickle.dumps(self.held)
        finally:
            cloudpickle.unregister_pickle_by_value(module)


def is_user_module(module):
    """Returns whether a module is a file of the user's: not an installed library, nor the kit."""
    return module.__name__ != "__main__" and not is_library(module.__name__)
