"""Progress bars."""

import io
import sys

from tqdm import tqdm


def progress_bar(*args, disable=False, **options):
    """Returns a bar of tqdm's on standard output; where a process has none, as under pythonw, one that nobody sees.

    Unless it is disabled here, the environment variable TQDM_DISABLE decides.
    """
    options |= {"disable": True} if disable else {}
    return tqdm(*args, file=sys.stdout or io.StringIO(), **options)
