"""A trained run, converted: logits, loss and perplexity of both frameworks on its own validation split."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
import torch

from jaxgpt.interop.torch_names import to_torch
from jaxgpt.model.loss import perplexity
from jaxgpt.parity.harness import Row, max_abs, own_errors
from jaxgpt.runs.restore import restore_language_model, split_of
from jaxgpt.tasks.language_modeling import whole_split_loss
from parity_tests.tolerances import error_row, ratio_row, row
from torch_ref.model import GPT
from torch_ref.train import whole_split_loss as torch_whole_split


def compare_run(path: Path, which: str, data_dir: Path | None) -> Iterator[Row]:
    """The rows. Raises `UserError` if the run, its checkpoint or its text cannot be had."""
    run, executor, state = restore_language_model(path, which)
    tokens = split_of(run, "val", data_dir)
    config = run.config.model
    weights = {name: torch.tensor(np.array(p)) for name, p in to_torch(jax.device_get(state.params)).items()}
    precision = str(np.asarray(state.params["token_emb.embedding"]).dtype)
    models = {}
    for dtype in ("float64", "float32"):
        models[dtype] = GPT(config, run.tokenizer.vocab_size).to(getattr(torch, dtype)).eval()
        models[dtype].load_state_dict(weights)  # after the dtype: loading rounds to it

    n_rows = min(run.config.batch_size, len(tokens) // config.block_size)
    idx_BT = tokens[: n_rows * config.block_size].reshape(n_rows, config.block_size).astype(np.int64)
    logits = jax.jit(lambda params, idx: executor.objective.exact_model(params)(idx))(state.params, idx_BT)
    with torch.no_grad():
        theirs, truth = (models[d](torch.from_numpy(idx_BT)).numpy() for d in ("float32", "float64"))
    case = f"{path.name} after {int(state.step)} steps"
    if precision == "float64":
        yield error_row("logits", precision, case, partial(max_abs, logits, truth))
    else:
        yield ratio_row("logits", precision, case, partial(own_errors, logits, theirs, truth))

    loss, count, *_ = whole_split_loss(executor, state.params, tokens, run.tokenizer)
    end_of_text = run.tokenizer.end_of_text if run.config.packing == "documents" else None
    split = (torch.from_numpy(tokens.astype(np.int64)), run.config.batch_size, end_of_text)
    true_loss, true_count = torch_whole_split(models["float64"], *split)
    torch_loss, _ = torch_whole_split(models["float32"], *split)
    assert count == true_count
    torch_error = abs(torch_loss / true_loss - 1) if precision == "float32" else None
    note = f"{loss:.6f}, PyTorch {torch_loss if precision == 'float32' else true_loss:.6f}, {count:,} tokens"
    yield row("loss", precision, case, abs(loss / true_loss - 1), torch_error, note=note)
    ppl = perplexity(loss)
    note = f"{ppl:.5f}, PyTorch {math.exp(true_loss):.5f}"
    yield row("perplexity", precision, case, abs(ppl / math.exp(true_loss) - 1), note=note)
