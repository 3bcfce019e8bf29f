"""The figure of pictures; a module of its own, as matplotlib's takes a while to import, and training draws nothing."""

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class Picture(Figure):
    """A figure that has its style also when it is drawn and saved, which is after the function that makes it.

    style: a context manager's function. Ticks are spaced by the size that the style of that moment has for their text.
    """

    def __init__(self, *args, style, **options):
        super().__init__(*args, **options)
        self.style = style

    def alternative_text(self):
        """Returns titles and labels, each once, for who cannot see the picture."""
        axes = [text for ax in self.axes for text in (ax.get_title(), ax.get_ylabel(), ax.get_xlabel())]
        texts = dict.fromkeys(" ".join(text.split()) for text in (self.get_suptitle(), *axes))
        return "; ".join(filter(None, texts))

    def _repr_mimebundle_(self, include=None, exclude=None):
        """Returns no data of its own, and what a notebook keeps beside its PNG."""
        return {}, {"image/png": {"alt": self.alternative_text()}}

    def draw(self, renderer):
        with self.style():
            super().draw(renderer)

    def savefig(self, *args, **options):
        with matplotlib.rc_context({"savefig.facecolor": "auto"}):  # its own
            super().savefig(*args, **options)


def new_picture(figsize, style):
    """Returns a picture that pyplot knows nothing of: it is its caller's, and a notebook shows it once."""
    picture = plt.figure(figsize=figsize, FigureClass=Picture, style=style)
    plt.close(picture)
    FigureCanvasAgg(picture)  # for what is closed is left with a canvas that draws nothing
    return picture
