"""Models as people have them, into what the service takes, each held against the original where it was exported.

Each needs its own extra: `pip install 'anneal-client[torch]'`. Nothing is imported before it is called.
"""

from anneal_client.exporting.huggingface import from_huggingface
from anneal_client.exporting.keras import from_tensorflow
from anneal_client.exporting.pytorch import from_torch
from anneal_client.exporting.tabular import from_sklearn, from_xgboost

__all__ = ["from_huggingface", "from_sklearn", "from_tensorflow", "from_torch", "from_xgboost"]
