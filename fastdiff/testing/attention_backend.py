"""A pytest plugin that adds our backend to diffusers' tests of attention backends.

`pytest TREE/tests/models/transformers -m attention -p fastdiff.testing.attention_backend`: every test that is run for each
backend runs for ours too.
"""

import pytest

from fastdiff.pipeline import register_attention_backend


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    backend = register_attention_backend()
    for mark in metafunc.definition.iter_markers("parametrize"):
        names, values = mark.args[:2]
        known = [getattr(value, "values", (value,))[0] for value in values]
        if names == "backend" and type(backend) in map(type, known) and backend not in known:
            values.append(pytest.param(backend, id=backend.value))
