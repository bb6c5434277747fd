"""Unit tests and their modules' fixtures run in a scratch folder: some libraries leave files in the current one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="package", autouse=True)
def scratch_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before, folder = Path.cwd(), tmp_path_factory.mktemp("current")
    os.chdir(folder)
    yield folder
    os.chdir(before)
