"""Looking inside: diagnostics, computation graphs, plots, summaries, comparisons."""

import logging

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # when imported, it warns of a home that cannot be written
