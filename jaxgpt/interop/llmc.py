"""llm.c's files of weights: a header of 256 int32, then the tensors of GPT-2, one kind after the other.

The format is that of `write_model` in its train_gpt2.py: magic 20240326, a version (3: float32, 5: bfloat16), block
size, vocabulary, blocks, heads, width and the vocabulary's padded size.
"""

import os
from pathlib import Path

import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.data.files import open_regular
from jaxgpt.errors import UserError
from jaxgpt.interop import torch_names
from jaxgpt.interop.torch_files import float32_of_bfloat16
from jaxgpt.interop.torch_model import TorchModel, model_config

MAGIC = 20240326
HEADER_BYTES = 4 * 256
DTYPES = {3: "<f4", 5: "<u2"}  # numpy has no bfloat16


def is_llmc(start: bytes) -> bool:
    """Whether a file that starts so is llm.c's."""
    return start[:4] == MAGIC.to_bytes(4, "little")


def read(path: Path) -> TorchModel:
    """The model in a file.

    Raises:
        OSError: the file cannot be read.
        UserError: it is of another version, or of another size than its header says.
    """
    with open_regular(path) as f:
        header = np.frombuffer(f.read(HEADER_BYTES), "<i4") if os.fstat(f.fileno()).st_size >= HEADER_BYTES else []
        if len(header) < 8:
            raise UserError("is shorter than llm.c's header; write it again")
        _, version, block_size, vocab_size, n_layer, n_head, n_embd, padded = map(int, header[:8])
        if version not in DTYPES:
            raise UserError(f"is of llm.c's version {version}; write it anew with a train_gpt2.py that writes 3 or 5")
        sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size)
        model = model_config(**sizes, tied_head=True, gelu="tanh", init="gpt2")
        shapes = _shapes(model, padded)
        dtype = np.dtype(DTYPES[version])
        n_bytes = sum(int(np.prod(shape)) for _, shape in shapes) * dtype.itemsize
        if not 0 < vocab_size <= padded or os.fstat(f.fileno()).st_size != HEADER_BYTES + n_bytes:
            raise UserError("has another size than its header says; write it again")
        tensors = {}
        for name, shape in shapes:
            values = np.frombuffer(f.read(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
            tensors[name] = float32_of_bfloat16(values) if version == 5 else values
    stacked = {name: p for name, p in tensors.items() if ".*." in name}
    plain = {name: p for name, p in tensors.items() if name not in stacked}
    blocks = {name.replace("*", str(i)): p[i] for name, p in stacked.items() for i in range(n_layer)}
    found = TorchModel("llm.c", model, torch_names.tutorial_names(plain | blocks), padded)
    return found.without_padding(vocab_size)


def _shapes(model: ModelConfig, vocab_size: int) -> list[tuple[str, tuple[int, ...]]]:
    """GPT-2's names and the shapes of the tensors in their order; `h.*` is all blocks, the first axis."""
    L, C = model.n_layer, model.n_embd
    of_block: list[tuple[str, tuple[int, ...]]] = [
        ("ln_1.weight", (C,)),
        ("ln_1.bias", (C,)),
        ("attn.c_attn.weight", (3 * C, C)),
        ("attn.c_attn.bias", (3 * C,)),
        ("attn.c_proj.weight", (C, C)),
        ("attn.c_proj.bias", (C,)),
        ("ln_2.weight", (C,)),
        ("ln_2.bias", (C,)),
        ("mlp.c_fc.weight", (4 * C, C)),
        ("mlp.c_fc.bias", (4 * C,)),
        ("mlp.c_proj.weight", (C, 4 * C)),
        ("mlp.c_proj.bias", (C,)),
    ]
    return [
        ("wte.weight", (vocab_size, C)),
        ("wpe.weight", (model.block_size, C)),
        *((f"h.*.{name}", (L, *shape)) for name, shape in of_block),
        ("ln_f.weight", (C,)),
        ("ln_f.bias", (C,)),
    ]
