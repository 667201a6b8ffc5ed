"""Look into a run: python scripts/inspect.py RUN --gradients | --attention "text" | --surprise "text" """

import sys

if __name__ == "inspect":
    # Python looks for modules in a script's own folder first, so that every command here would take this file for the
    # standard library's `inspect`. It gets that one.
    import importlib.util
    import os
    from importlib.machinery import PathFinder

    here = os.path.dirname(os.path.realpath(__file__))
    found = PathFinder.find_spec("inspect", [p for p in sys.path if os.path.realpath(p or ".") != here])
    assert found is not None and found.loader is not None, "a Python without its standard library"
    sys.modules["inspect"] = module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)

if __name__ == "__main__":
    from jaxgpt.cli import run_command
    from jaxgpt.inspection import main

    run_command(main)
