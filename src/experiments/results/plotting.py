"""matplotlib, whose own messages reach nobody's output."""

import logging

# At its first import it looks for fonts and for a cache folder, and logs both as warnings.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

from matplotlib import colormaps  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

__all__ = ["Figure", "colormaps"]
