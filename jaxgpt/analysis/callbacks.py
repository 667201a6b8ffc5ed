"""Callbacks that draw the records of a run."""

from jaxgpt.callbacks import Callback
from jaxgpt.runs.run_dir import RunDir


class PlotLearningCurves(Callback):
    """Draws learning_curves.png into the run's folder when training stops."""

    def __init__(self, run: RunDir, title: str):
        self.run, self.title = run, title

    def on_train_end(self, step: int) -> None:
        from jaxgpt.analysis.plots import learning_curves  # imports matplotlib, which would delay the first step

        path = self.run.path / "learning_curves.png"
        learning_curves(path, self.title, self.run.read_steps(), self.run.read_metrics())
