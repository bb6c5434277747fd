"""The examples that the READMEs of `clients/` show are those that tests run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CLIENTS = Path(__file__).resolve().parents[2] / "clients"


@pytest.mark.parametrize("example", ["airflow/example_dag.py", "kubeflow/example_pipeline.py"])
def test_a_readme_shows_the_example_that_is_run(example: str) -> None:
    path = CLIENTS / example
    (shown,) = re.findall(r"```python\n(.*?)```", (path.parent / "README.md").read_text(), flags=re.DOTALL)
    assert shown == path.read_text()
