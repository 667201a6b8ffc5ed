"""One implementation of the training step, in a process of its own that `alternating.Worker` starts.

It reads commands from standard input and answers each with one line of JSON: `start` builds the model and computes
the first step, `run N` computes N more, `memory` gives the largest memory so far, `probe NAME ...` measures something
else.
The process ends with its input.
"""

import contextlib
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BEGUN = time.perf_counter()
BEFORE_PYTHON = time.time() - float(os.environ.get("JAXGPT_BENCH_BEGUN", time.time()))

import numpy as np  # noqa: E402

from jaxgpt.config import TrainConfig, from_json  # noqa: E402
from jaxgpt.errors import UserError  # noqa: E402

Answer = dict[str, Any]


def load_plan(folder: Path) -> tuple[TrainConfig, int, np.ndarray]:
    """What all implementations share: the configuration, the vocabulary's size and the tokens [N]."""
    plan = json.loads((folder / "plan.json").read_text())
    config = from_json(plan["config"])
    assert isinstance(config, TrainConfig)
    return config, plan["vocab_size"], np.load(folder / "tokens.npy")


class Ours:
    """The trainer's own compiled steps."""

    def __init__(self, folder: Path):
        import jax

        from benchmarks.trainer_steps import TrainerSteps
        from jaxgpt import parallel
        from jaxgpt.objective import LanguageModelingObjective

        self.jax, self.folder = jax, folder
        self.config, vocab_size, tokens_N = load_plan(folder)
        parallel.configure_jax(self.config, Path(os.environ["JAXGPT_BENCH_CACHE"]))
        self.objective = LanguageModelingObjective(self.config, vocab_size, parallel.numerics(self.config))
        # PyTorch's implementations use one GPU, too, or all of a CPU's cores.
        executor = parallel.Executor(self.objective, parallel.cores_or_one_device(self.objective))
        self.steps = TrainerSteps(executor, tokens_N)
        self.run = self.steps.run
        self.name = f"jaxgpt, jax {jax.__version__}"

    def share(self, n_steps: int) -> None:
        """Writes the initial weights under PyTorch's names, and the starts of the windows of the first steps."""
        from jaxgpt.interop.torch_names import to_torch

        weights = to_torch(self.jax.device_get(self.steps.executor.init_state().params))
        with (self.folder / "weights.npz").open("wb") as file:
            np.savez(file, **weights)
        np.save(self.folder / "starts.npy", self.steps.sampler.starts(0, n_steps))
        (self.folder / "device.json").write_text(json.dumps([self.jax.default_backend(), self.dtype()]))

    def memory(self) -> float:
        stats = self.jax.local_devices()[0].memory_stats() or {}
        return stats["peak_bytes_in_use"] / 2**20 if "peak_bytes_in_use" in stats else resident_mib()

    def dtype(self) -> str:
        return np.dtype(self.objective.numerics.compute_dtype).name

    def machine(self) -> dict[str, str]:
        on_cpu = self.jax.default_backend() == "cpu"
        device = cpu_name() if on_cpu else self.jax.local_devices()[0].device_kind
        versions = {"python": platform.python_version(), "jax": self.jax.__version__}
        return {"device": device, "platform": self.jax.default_backend(), "dtype": self.dtype(), **versions}

    def probe_product(self) -> Answer:
        """FLOP/s of a large square product in the compute dtype."""
        jax = self.jax
        dtype = self.objective.numerics.compute_dtype
        size = 2048 if jax.default_backend() == "cpu" else 8192
        a = jax.random.normal(jax.random.key(0), (size, size), dtype)
        product = jax.jit(lambda a: a @ a)
        product(a).block_until_ready()
        times = [seconds(lambda: product(a).block_until_ready()) for _ in range(8)]
        return {"size": size, "flop_s": 2 * size**3 / min(times)}

    def probe_generate(self, batch: str) -> Answer:
        """Tokens per second of sampling a batch of texts as long as the block; the tokens of all rows count."""
        from jaxgpt.config import SamplingConfig
        from jaxgpt.model.sampling import generate_batch
        from jaxgpt.parallel import on_one_device

        n_new = min(self.config.model.block_size - 1, 200)
        sampling = SamplingConfig(max_new_tokens=n_new, temperature=0.8, top_k=20)
        model, prompt_BT = self.objective.exact_model, np.zeros((int(batch), 1), np.int64)
        params = on_one_device(self.steps.state.params)
        steps = generate_batch(model, params, self.config.model, prompt_BT, sampling)
        times = [time.perf_counter() for _ in steps]
        # From the second token on: the first ones compile what reads a window and what reads a token.
        rate = (len(times) - 2) * len(prompt_BT) / (times[-1] - times[1])
        return {"batch": len(prompt_BT), "tokens": n_new, "tokens_s": rate}


class Torch:
    """The documented PyTorch loop on the same weights and batches.

    Variants: "eager", attention written out as documented; "sdpa", F.scaled_dot_product_attention in its place;
    "compile", SDPA and torch.compile; on a GPU "cudnn" and "graphs": torch.compile with cuDNN's attention, without and
    with CUDA graphs. All but "eager" have PyTorch's fused AdamW.
    """

    def __init__(self, folder: Path, variant: str):
        import torch

        from torch_ref.model import GPT, Attention
        from torch_ref.train_step import make_optimizer

        torch.set_float32_matmul_precision("highest")
        self.torch, self.variant = torch, variant
        self.config, vocab_size, self.tokens_N = load_plan(folder)
        self.start_KB = np.load(folder / "starts.npy")
        ours_on, dtype = json.loads((folder / "device.json").read_text())
        self.on, self.amp = "cuda" if torch.cuda.is_available() else "cpu", dtype == "bfloat16"
        if {"gpu": "cuda"}.get(ours_on, ours_on) != self.on:
            raise UserError(f"--sides {variant}: PyTorch computes on {self.on}, JAX on {ours_on}; install alike builds")
        if variant != "eager":
            Attention.forward = sdpa_forward
        self.model = GPT(self.config.model, vocab_size)
        with np.load(folder / "weights.npz") as weights:
            self.model.load_state_dict({name: torch.tensor(weights[name]) for name in weights})
        self.model.to(self.on)
        self.optimizer = make_optimizer(self.model, self.config)
        if variant != "eager":
            kept = ("lr", "betas", "eps", "weight_decay", "params")
            groups = [{name: group[name] for name in kept} for group in self.optimizer.param_groups]
            self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.loss_of: Callable[..., Any] = self.mean_loss
        if variant not in ("eager", "sdpa"):
            self.loss_of = torch.compile(self.mean_loss, mode="reduce-overhead" if variant == "graphs" else None)
        words = {
            "eager": "eager, the documented loop",
            "sdpa": "eager, SDPA",
            "compile": "compiled, SDPA",
            "cudnn": "compiled, cuDNN's attention",
            "graphs": "compiled, cuDNN's attention, CUDA graphs",
        }
        self.name, self.step = f"PyTorch {torch.__version__}, {words[variant]}", 0

    def mean_loss(self, idx_BT: Any, target_BT: Any) -> Any:
        from torch.nn import functional as F

        with self.torch.autocast(self.on, self.torch.bfloat16, enabled=self.amp):
            logits_BTV = self.model(idx_BT)
        return F.cross_entropy(logits_BTV.float().view(-1, logits_BTV.shape[-1]), target_BT.reshape(-1))

    def run(self, n_steps: int) -> list[float]:
        """Trains `n_steps` further; returns their losses. Only the documented loop reads each loss at once."""
        losses, at_T = [], np.arange(self.config.model.block_size + 1)
        with self.attention():
            for _ in range(n_steps):
                start_B = self.start_KB[self.step % len(self.start_KB)]
                window_BT = self.torch.from_numpy(self.tokens_N[start_B[:, None] + at_T].astype(np.int64))
                window_BT = window_BT.pin_memory().to(self.on, non_blocking=True) if self.on == "cuda" else window_BT
                loss = self.loss_of(window_BT[:, :-1].contiguous(), window_BT[:, 1:].contiguous())
                self.optimizer.zero_grad()
                loss.backward()
                if self.config.clip:
                    self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
                self.optimizer.step()
                losses.append(loss.item() if self.variant == "eager" else loss.detach().clone())
                self.step += 1
        return [float(loss) for loss in losses]

    def attention(self) -> contextlib.AbstractContextManager:
        if self.variant not in ("cudnn", "graphs"):
            return contextlib.nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)

    def memory(self) -> float:
        return self.torch.cuda.max_memory_allocated() / 2**20 if self.on == "cuda" else resident_mib()

    def machine(self) -> dict[str, str]:
        return {"torch": self.torch.__version__}


def sdpa_forward(self: Any, x_BTC: Any, same_BTS: Any = None) -> Any:
    """`torch_ref.model.Attention.forward` with PyTorch's fused attention."""
    from torch.nn import functional as F

    B, T, C = x_BTC.shape
    qkv = (W(x_BTC).view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for W in (self.Wq, self.Wk, self.Wv))
    return self.Wo(F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).reshape(B, T, C))


def cpu_name() -> str:
    """The CPU's model and how many of its cores this process may use."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {model} CPU"


def resident_mib() -> float:
    """The largest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def seconds(function: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def answers(implementation: str, folder: Path) -> Iterator[Answer]:
    """The answer to each line of the input."""
    ours = implementation == "ours"
    running: Any = None
    for line in sys.stdin:
        word, *arguments = line.split()
        if word == "start":
            try:
                running = Ours(folder) if ours else Torch(folder, implementation)
            except UserError as e:
                yield {"error": str(e)}
                return
            losses = running.run(1)
            first_s = BEFORE_PYTHON + time.perf_counter() - BEGUN
            if ours:
                running.share(int(arguments[0]))
            yield {"name": running.name, "machine": running.machine(), "first_step_s": first_s, "losses": losses}
        elif word == "run":
            begun = time.perf_counter()
            losses = running.run(int(arguments[0]))
            yield {"seconds": time.perf_counter() - begun, "losses": losses}
        elif word == "memory":
            yield {"mib": running.memory()}
        else:
            assert word == "probe", line
            yield getattr(running, f"probe_{arguments[0]}")(*arguments[1:])


def main() -> None:
    implementation, folder = sys.argv[1], Path(sys.argv[2])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    for answer in answers(implementation, folder):
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
