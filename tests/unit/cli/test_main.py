"""`jaxgpt`: usage, commands and exit codes."""

import subprocess
import sys

import pytest
from conftest import ROOT

from jaxgpt import __version__
from jaxgpt.cli import main
from jaxgpt.errors import LossNotFinite, UserError


def test_no_command_prints_the_usage(cli):
    done = cli()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: jaxgpt COMMAND")


def test_help_lists_all_commands(cli):
    done = cli("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")] == list(main.COMMANDS)


def test_version(cli):
    assert cli("--version").stdout == f"jaxgpt {__version__}\n"


def test_an_unknown_command_names_the_nearest(cli):
    done = cli("trian")
    assert done.returncode == 2
    assert done.stderr.startswith("error: jaxgpt trian: unknown command; choose of train, generate")
    assert done.stderr.endswith("did you mean train?\n")


@pytest.mark.parametrize("command", [*main.COMMANDS, "convert import", "convert export"])
def test_the_help_of_a_command_shows_its_name(cli, command):
    done = cli(*command.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: jaxgpt {command}" in done.stdout


@pytest.mark.parametrize(
    "command", ["convert import", "convert export", "evaluate", "generate", "classify", "finetune"]
)
def test_missing_arguments_name_the_command(cli, command):
    done = cli(*command.split())
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: Missing from jaxgpt {command}: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("error, code", [(UserError("--x 1: too small"), 2), (LossNotFinite("step 3"), 3)])
def test_errors_are_one_line_and_an_exit_code(monkeypatch, capsys, error, code):
    def fail(args):
        raise error

    monkeypatch.setattr(main, "_dispatch", fail)
    assert main.run([]) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_interrupt_is_left_to_the_caller_of_run(monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_dispatch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main.run([])


def test_an_interrupted_process_ends_without_waiting_for_threads():
    program = (
        "import threading; from jaxgpt.cli import main\n"
        "def interrupt(args):\n"
        "    threading.Thread(target=threading.Event().wait).start()\n"
        "    raise KeyboardInterrupt\n"
        "main._dispatch = interrupt\n"
        "main.main()\n"
    )
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_the_module_is_the_command():
    line = [sys.executable, "-m", "jaxgpt", "--version"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"jaxgpt {__version__}\n")


def test_the_scripts_are_the_commands():
    scripts = {path.stem: path.read_text() for path in (ROOT / "scripts").glob("*.py")}
    assert set(scripts) == set(main.COMMANDS) - {"inspect"}  # that name would shadow a module of the standard library
    for name, text in scripts.items():
        assert text.endswith(f'if __name__ == "__main__":\n    script("{name}")\n')


def test_help_imports_no_jax():
    program = "import sys; from jaxgpt.cli import main; main.run(['train', '--help']); sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
