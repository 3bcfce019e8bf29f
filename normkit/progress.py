"""Progress bars."""

import io
import sys

from tqdm import tqdm


def progress_bar(*args, **options):
    """Returns a bar of tqdm's on standard output; where a process has none, as under pythonw, one that nobody sees."""
    return tqdm(*args, file=sys.stdout or io.StringIO(), **options)
