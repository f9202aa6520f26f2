"""A pytest plugin that runs tests of hooks on accelerated modules: `pytest TREE/tests/hooks -p fastdiff.testing.accelerate_modules`.

Every module that a test makes of a class from a test file is accelerated as soon as it is made, layer by layer, with its
parts. The summary says how many.
"""

import functools

from torch import nn

import fastdiff

_made: list[str] = []
_depth = [0]


def _accelerated(init):
    """A class's __init__ that accelerates what it made, unless that is a part of something else."""

    @functools.wraps(init)
    def make(self, *args, **kwargs):
        _depth[0] += 1
        try:
            init(self, *args, **kwargs)
        finally:
            _depth[0] -= 1
        if not _depth[0]:
            fastdiff.accelerate(self)
            _made.append(type(self).__name__)

    return make


def pytest_collection_modifyitems(items):
    for module in {item.module for item in items}:
        for found in list(vars(module).values()):
            own = isinstance(found, type) and issubclass(found, nn.Module) and found.__module__ == module.__name__
            if own and "__init__" in vars(found):
                found.__init__ = _accelerated(found.__init__)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("fastdiff modules")
    terminalreporter.line(f"{len(_made)} modules of {len(set(_made))} classes accelerated")
