"""The commands of README and docs run as they stand on the page; this file adds flags that make them small.

`RUN`, `my.txt` and the other names that the pages use for the reader's own files exist where a page's commands run.
A block that cannot run here has a line `<!-- not run: reason -->` before it, and a line in NOT_RUN below.
"""

import random
import re
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from documentation import COMMANDS, PAGES, ROOT, Block, blocks
from pyarrow import parquet

from jaxgpt.cli.args import parse_train_flags

# The blocks that are not run: (page, first line).
NOT_RUN = {
    ("CONTRIBUTING.md", "make env"),
    ("README.md", "jaxgpt convert import openai-community/gpt2 --out runs/gpt2"),
    ("docs/accelerators.md", 'pip install -e ".[aot-tpu]"'),
    ("docs/scale.md", "export JAX_NUM_CPU_DEVICES=1"),
    ("docs/scale.md", "python scripts/plan.py --preset gpt2 --batch-size 256 --target H100:32 --mesh data=4,fsdp=8"),
    ("docs/scale.md", "python -m benchmarks.scale"),
    ("docs/gpt2-billion-tokens.md", "# one H100"),
    (
        "docs/gpt2-billion-tokens.md",
        "python scripts/plan.py --preset gpt2 --batch-size 512 --target v5e:4x4 --grad-accum 4",
    ),
    (
        "docs/gpt2-billion-tokens.md",
        "python scripts/train.py --preset gpt2 --dataset bin:fineweb10B --out-dir runs/gpt2",
    ),
    ("docs/reliability.md", "python -m tests.faults"),
    ("CONTRIBUTING.md", 'make test ARGS="tests/unit/test_train_step.py"'),
    ("docs/benchmarks.md", "python scripts/bench.py --preset minigpt,nanogpt-cpu"),
    ("docs/benchmarks.md", "make accelerator"),
    ("docs/evaluation.md", "jaxgpt convert import openai-community/gpt2 --out gpt2"),
    ("docs/evaluation.md", "jaxgpt convert export RUN --to huggingface --out exported"),
    ("docs/benchmarks.md", "python -m benchmarks.generation --docs"),
    ("docs/fine-tuning.md", "python scripts/train.py --preset wikitext2 --out-dir runs/base"),
    ("docs/fine-tuning.md", "python scripts/convert.py export RUN --out w.safetensors"),
    ("docs/interop.md", "jaxgpt convert import openai-community/gpt2 --out runs/gpt2"),
    ("docs/interop.md", "jaxgpt train --init-from openai-community/gpt2 --dataset file:my.txt --steps 1000 --lr 3e-5"),
    ("docs/interop.md", "jaxgpt convert export RUN --to nanogpt --out out/ckpt.pt"),
    ("docs/parity.md", "python scripts/parity.py"),
    ("README.md", 'pip install -e ".[parity]"'),
    ("docs/planted-faults.md", "python -m tests.parity_pairs"),
    ("docs/porting.md", "pip install torch transformers"),
    ("docs/quick-start.md", "make env"),
    ("docs/quick-start.md", "python -m venv .venv && source .venv/bin/activate"),
    ("docs/quick-start.md", 'make train ARGS="--steps 1"'),
    ("docs/quick-start.md", "python scripts/parity.py"),
}
TINY = "--model.n-layer 1 --model.n-head 2 --model.n-embd 16 --model.block-size 16 --batch-size 8"
REPORTS = "--eval-every 10 --eval-batches 2 --sample-tokens 20"
SMALL = f"{TINY} {REPORTS} --steps 20"
# What is added to a command that matches.
ADDED = (
    (r"scripts/(train|compare)\.py|convert\.py import", SMALL),
    (r"torch_ref\.train", f"{TINY} {REPORTS} --steps 10"),
    (r"--preset wikitext2", "--tokenizer bpe:300"),
    (r"^(?!.*(--dataset|--preset wikitext2)).*(train|compare)\.py", "--dataset file:my.txt"),
    (r"torch_ref\.train|convert\.py import", "--dataset file:my.txt"),
    (r"finetune\.py", "--epochs 1 --batch-size 8 --max-tokens 16"),
)


def small(command: str) -> str:
    """The command with its added flags; a flag given twice has its last value. The text is one of our own."""
    added = [flags for pattern, flags in ADDED if re.search(pattern, command)]
    return " ".join([command.replace("--dataset tinyshakespeare", "--dataset file:my.txt"), *added])


def all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language in COMMANDS]


def lines(block: Block) -> list[str]:
    """A block's commands, without comments; of a console's those after the prompt."""
    text = [re.split(r"\s+# ", line)[0] for line in block.text.splitlines()]
    if block.language == "console":
        return [line.removeprefix("$ ") for line in text if line.startswith("$ ")]
    return [line for line in text if line]


def folder_of_a_reader(folder: Path) -> Path:
    """Texts and tables of our own, under the names that the pages use for the reader's."""
    draw = random.Random(0)
    words = [*"the a cat dog sat on mat report goals stocks fell after two late".split(), string.printable.strip()]

    def sentence(n_words: int) -> str:
        return " ".join(draw.choices(words, [8] * (len(words) - 1) + [1], k=n_words))

    (folder / "my.txt").write_text("\n".join(sentence(12) for _ in range(500)))
    rows = [
        f'"{sentence(3)}","{sentence(8)}",{draw.choice(["sports", "markets"])}'.replace('!"#', "!#") for _ in range(200)
    ]
    (folder / "my.csv").write_text("\n".join(["title,body,topic", *rows]))
    (folder / "data" / "wikitext-2").mkdir(parents=True)
    for name in ("train.txt", "valid.txt"):
        (folder / "data" / "wikitext-2" / name).write_text("\n".join(sentence(30) for _ in range(120)))
    (folder / "data" / "ag_news").mkdir()
    rows = [f'"{draw.randint(1, 4)}","{sentence(3)}","{sentence(8)}"'.replace('!"#', "!#") for _ in range(100)]
    (folder / "data" / "ag_news" / "test.csv").write_text("\n".join(rows))
    (folder / "my_corpus").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002"):
        table = pyarrow.table({"text": [sentence(30) for _ in range(200)]})
        parquet.write_table(table, folder / "my_corpus" / f"{name}.parquet")
    programs = folder / "bin"
    programs.mkdir()
    for name, call in (("python", ""), ("jaxgpt", "-m jaxgpt")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {call} "$@"\n')
        (programs / name).chmod(0o755)
    for name in ("scripts", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def reader(tmp_path, cli, user_env):
    """Runs one command line in the folder of a reader; returns the finished process. `reader.folder` is the folder."""
    folder = folder_of_a_reader(tmp_path)
    environment = {"JAXGPT_DATA_DIR": str(folder / "data"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

    def run(line: str) -> subprocess.CompletedProcess:
        words = shlex.split(line)
        script = re.fullmatch(r"scripts/(\w+)\.py", words[1])
        if words[0] == "jaxgpt" or words[0] == "python" and script:
            return cli(*([script[1], *words[2:]] if script else words[1:]), cwd=folder, **environment)
        env = {**user_env, **environment, "PATH": f"{folder / 'bin'}:{user_env['PATH']}"}
        return subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True, timeout=300)

    run.folder = folder
    return run


def masked(line: str) -> str:
    """A line of output with every figure as `#`, on any number of devices."""
    return re.sub(r"# x CPU", "CPU", re.sub(r"\d[\d,.]*(e[+-]\d+)?", "#", " ".join(line.split())))


def test_the_readmes_commands_print_what_it_shows(reader):
    """Every line with a figure that the README shows comes out of the command above it, but for the figures."""
    (block,) = [block for block in blocks("README.md") if block.language == "console"]
    shown: dict[str, list[str]] = {}
    for line in block.text.splitlines():
        if line.startswith("$ "):
            shown[line.removeprefix("$ ")] = []
        else:
            shown[list(shown)[-1]].append(line)
    assert [re.search(r"scripts/(\w+)", command)[1] for command in shown] == ["train", "generate", "parity"]
    for command, expected in shown.items():
        done = reader(small(command))
        assert done.returncode == 0, done.stderr
        printed = {
            masked(line.replace(f"file:{reader.folder}/my.txt", "tinyshakespeare")) for line in done.stdout.splitlines()
        }
        wanted = {masked(line) for line in expected if re.search(r"\d|:$", line)}
        assert wanted and wanted <= printed, sorted(wanted - printed)


def python_output(page, folder, monkeypatch, capsys) -> list[str]:
    """What the Python block of a page prints in a reader's folder."""
    (block,) = [block for block in blocks(page) if block.language == "python"]
    monkeypatch.chdir(folder_of_a_reader(folder))
    monkeypatch.setenv("HOME", str(folder))
    exec(compile(block.text, page, "exec"), {})
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_the_readmes_library_example(tmp_path, monkeypatch, capsys):
    """It learns: the perplexity of a model that knows nothing is its vocabulary."""
    perplexity, shape, *texts = python_output("README.md", tmp_path, monkeypatch, capsys)
    n_tokens, vocab_size = map(int, re.findall(r"\d+", shape))
    assert n_tokens == len("A GPT trainer") and 3 < float(perplexity.split()[1]) < vocab_size - 20
    assert texts[0].startswith("A GPT") and any(line.startswith("PyTorch is") for line in texts)


@pytest.mark.slow
def test_the_example_of_the_librarys_page(tmp_path, monkeypatch, capsys):
    lines = python_output("docs/library.md", tmp_path, monkeypatch, capsys)
    assert lines[0].startswith("20 ") and lines[2].startswith("(7, ") and "the " in "\n".join(lines)


def test_no_block_is_left_out_silently():
    assert {(block.page, block.first_command) for block in all_blocks() if block.not_run} == NOT_RUN


@pytest.mark.parametrize("block", [block for block in blocks("docs/scale.md") if block.language in ("shell", "yaml")])
def test_the_flags_of_a_clusters_script_are_those_of_the_command(block):
    """The scripts of clusters cannot be run here; their variables stand for numbers and names."""
    text = re.sub(r"\$\(.*\)", "10.0.0.1", block.text).replace("\\\n", " ")
    found = re.search(r"(?:scripts/train\.py|jaxgpt train)((?:\s+--[^\s\"]+(?: [^-\s\"][^\s\"]*)?)+)", text)
    assert found, block.text
    numbers = {"$SKYPILOT_NUM_NODES": "2", "$SKYPILOT_NODE_RANK": "1", "$JOB_COMPLETION_INDEX": "1"}
    flags = parse_train_flags([numbers.get(word, word) for word in found[1].split()], None, "jaxgpt train")
    assert flags.distributed and flags.batch_size == 512 and flags.out_dir and "fineweb" in flags.dataset


RUN_PAGES = sorted({block.page for block in all_blocks() if not block.not_run and block.language == "bash"})


@pytest.fixture(scope="module")
def trained_run(command, tmp_path_factory) -> Path:
    """The run that the pages call RUN."""
    folder = folder_of_a_reader(tmp_path_factory.mktemp("reader"))
    done = command("train.py", "--dataset", f"file:{folder / 'my.txt'}", "--out-dir", folder / "RUN", *SMALL.split())
    assert done.returncode == 0, done.stderr
    return folder / "RUN"


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_PAGES)
def test_the_commands_of_a_page_run(page, reader, trained_run):
    """In order, each in the folder that the ones before have left."""
    shutil.copytree(trained_run, reader.folder / "RUN")
    for block in blocks(page):
        if block.language == "bash" and not block.not_run:
            for line in lines(block):
                done = reader(small(line))
                assert done.returncode == 0, f"{page}:{block.line}: {line}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
