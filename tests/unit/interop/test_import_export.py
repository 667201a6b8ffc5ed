"""Import of weights as a run."""

import jax
import pytest

from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.data.corpora import load_corpus
from jaxgpt.interop import import_export, safetensors, torch_names
from jaxgpt.interop.pretrained import load_weights
from jaxgpt.model import gpt
from jaxgpt.runs.checkpoint import Checkpoints


def test_an_interrupted_import_leaves_no_run(monkeypatch, text, text_file, tmp_path):
    """Else training would start from other weights than the file's, without a message."""

    def interrupted(*_):
        raise KeyboardInterrupt

    model = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16)
    params = gpt.init_params(jax.random.key(0), model, len(set(text)), gpt.Numerics())
    safetensors.write([("--out", tmp_path / "w", torch_names.to_torch(params))])
    weights = load_weights(tmp_path / "w", "--weights", model)
    monkeypatch.setattr(Checkpoints, "save", interrupted)
    corpus = load_corpus(f"file:{text_file}", None, print)
    config = TrainConfig(dataset=corpus.name, batch_size=8, model=model)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        import_export.import_run(config, corpus, weights, "--weights w", out, False, print)
    assert not (out / "config.json").exists()
    assert not (out / "checkpoints").exists()
    monkeypatch.undo()
    import_export.import_run(config, corpus, weights, "--weights w", out, False, print)
    assert (out / "config.json").exists()
