"""The figure of pictures; a module of its own, as matplotlib's takes a while to import, and training draws nothing."""

import matplotlib
from matplotlib.figure import Figure


class Picture(Figure):
    """A figure that is also saved on its own background, where the user's style has a dark one for saved figures."""

    def savefig(self, *args, **options):
        with matplotlib.rc_context({"savefig.facecolor": "auto"}):
            super().savefig(*args, **options)
