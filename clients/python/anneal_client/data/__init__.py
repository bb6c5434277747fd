"""Data sets as people have them, into what the service takes: shards of `.npz`, written as the data come by, so memory
stays flat. What these make is given to `upload_dataset` or `optimize` like a file.

They need numpy (`pip install 'anneal-client[data]'`), and what the data are in.
"""

from anneal_client.data.arrays import from_arrays
from anneal_client.data.batches import from_dataloader
from anneal_client.data.pictures import from_pictures
from anneal_client.data.rows import from_dataset, from_pandas
from anneal_client.prepared import Dataset

__all__ = ["Dataset", "from_arrays", "from_dataloader", "from_dataset", "from_pandas", "from_pictures"]
