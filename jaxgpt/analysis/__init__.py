"""Looking inside: diagnostics, computation graphs, plots, summaries, comparisons."""
