"""Make some steps' images NaN, as broken memory or a broken kernel would: no picture can be.

Python imports this by itself in every process that has this folder in PYTHONPATH. Steps are
counted from 0, and named in POISON: "9,10,11".
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
    steps = {int(step) for step in os.environ["POISON"].split(",")}

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


if "POISON" in os.environ:
    sys.meta_path.insert(0, _Finder())
