"""Make some steps' images NaN, as broken memory or a broken kernel would: no picture can be.

Python imports this by itself in every process that has this folder in PYTHONPATH, as those of the
tests' Ray have. Steps are counted from 0, and stand in the file that POISON names: "9,10,11". While
there is no such file, nothing is changed.
"""

import importlib.abc
import importlib.util
import os
import sys


class _Finder(importlib.abc.MetaPathFinder):
    """Changes droppos.step when it is imported, and costs nobody else an import of torch."""

    def find_spec(self, name, path=None, target=None):
        if name != "droppos.step":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        exec_module = spec.loader.exec_module

        def patched(module):
            exec_module(module)
            _poison(module)

        spec.loader.exec_module = patched
        return spec


def _poison(module):
    train_step = module.train_step
    with open(os.environ["POISON"]) as file:  # noqa: PTH123 - quick to import
        steps = {int(step) for step in file.read().split(",")}

    def spoilt(state, micro_batches):
        if state.step not in steps:
            return train_step(state, micro_batches)
        hook = state.model.register_forward_pre_hook(
            lambda _, given: (given[0] * float("nan"), *given[1:])
        )
        try:
            return train_step(state, micro_batches)
        finally:
            hook.remove()

    module.train_step = spoilt


if os.path.exists(os.environ.get("POISON", "")):  # noqa: PTH110
    sys.meta_path.insert(0, _Finder())
