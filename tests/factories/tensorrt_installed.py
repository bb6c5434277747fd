"""Importing this module installs the stand-ins, with a signing key: what `IsolatedRunner` is given, so that the
children of stage calls have them. Graphs with certain ops fail in certain ways."""

from __future__ import annotations

from tests.factories import cuda_standin, tensorrt_standin
from workers import installation

tensorrt_standin.behaviour = tensorrt_standin.Behaviour(
    unknown_ops=frozenset({"Celu"}),
    build_error_ops={"Elu": "Could not find any implementation for node act."},
    slow_ops={"Selu": 5.0},
)
installation.use(installation.Installation(b"k" * installation.KEY_BYTES))
cuda_standin.install()
