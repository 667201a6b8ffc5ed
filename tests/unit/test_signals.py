"""Warning signals are collected, held back and forwarded; exit codes of stopped trainings."""

import os
import signal
import subprocess
import sys

import pytest

from jaxgpt.signals import exit_code, stop_signals, warning_signals, warning_signals_held

USR1, USR2, TERM, INT = signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize("received, code", [([], 0), ([USR1, USR2], 0), ([TERM], 143), ([USR1, INT, TERM], 130)])
def test_exit_codes(received, code):
    assert exit_code(received) == code


def test_every_warning_is_collected_and_the_handlers_come_back():
    before = signal.getsignal(USR1), signal.getsignal(USR2)
    with warning_signals() as warnings, stop_signals() as stop:
        for number in (USR1, USR2, USR1, TERM):
            os.kill(os.getpid(), number)
    assert warnings == [USR1, USR2, USR1] and stop == [TERM]
    assert (signal.getsignal(USR1), signal.getsignal(USR2)) == before


def test_a_warning_during_the_preparation_waits_for_the_trainer():
    with warning_signals():
        os.kill(os.getpid(), USR2)
        with warning_signals() as warnings:
            os.kill(os.getpid(), USR1)
            assert warnings == [USR2, USR1]
        os.kill(os.getpid(), USR2)
    with warning_signals() as others:
        assert not others


def test_a_process_is_started_with_warnings_held_back():
    code = """if True:
        from jaxgpt.signals import warning_signals
        with warning_signals() as warnings:
            print(warnings)
    """
    with warning_signals_held():
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process.send_signal(USR1)  # at once, before the interpreter runs
    assert process.communicate(timeout=60)[0] == f"[{int(USR1)}]\n"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {USR1, USR2}
