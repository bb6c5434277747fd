"""The examples that the READMEs of `clients/` and the page on platforms show are those that tests run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CLIENTS = REPOSITORY / "clients"


@pytest.mark.parametrize("example", ["airflow/example_dag.py", "kubeflow/example_pipeline.py"])
def test_a_readme_shows_the_example_that_is_run(example: str) -> None:
    path = CLIENTS / example
    (shown,) = re.findall(r"```python\n(.*?)```", (path.parent / "README.md").read_text(), flags=re.DOTALL)
    assert shown == path.read_text()


@pytest.mark.parametrize("example", ["prefect_flow.py", "dagster_assets.py"])
def test_the_page_on_platforms_shows_the_example_that_is_run(example: str) -> None:
    shown = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "platforms.md").read_text(), flags=re.DOTALL)
    assert (REPOSITORY / "examples" / "platforms" / example).read_text() in shown
