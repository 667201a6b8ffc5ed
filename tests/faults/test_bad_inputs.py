"""Bad inputs to all commands: exit code 2, one line that names the flag or the file, and nothing written."""

import re

import pytest

from jaxgpt.cli.main import COMMANDS
from tests.faults.bad_inputs import WORKS, BadInput, attempt, default_tests, make_sandbox, table

DEFAULT = default_tests()


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    return make_sandbox(tmp_path_factory.mktemp("bad-inputs") / "sandbox")


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[pytest.mark.slow] * (case not in DEFAULT)) for case in table()]
)
def test_is_refused(cli, sandbox, case: BadInput):
    outcome, line = attempt(cli, case, sandbox)
    assert outcome == "told", f"jaxgpt {case}: {line}"


@pytest.mark.parametrize("command", WORKS)
def test_every_flag_that_help_lists_is_in_the_table(cli, command):
    listed = set(re.findall(r"(?m)^[^\w-]*(--[a-z][a-z.-]*\w)", cli(*command.split(), "--help", COLUMNS="200").stdout))
    tried = {word for case in table() if case.command == command for arg in case.args for word in arg.split("=")}
    missing = {name for name in listed if not name.startswith(("--no-", "--model.no-"))} - tried - {"--help"}
    assert not missing


def test_the_default_tests_try_400_and_every_command():
    assert len(DEFAULT) >= 400
    assert {case.command.partition(" ")[0] for case in DEFAULT} >= set(COMMANDS)
    assert {case.command for case in table()} >= set(WORKS)
