"""Importing this module installs the stand-ins: what `IsolatedRunner` is given, so that its children have them."""

from __future__ import annotations

from tests.factories import cuda_standin

cuda_standin.install()
