"""Loaders that give batch after batch, as torch's DataLoader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from anneal_client.data.shards import ShardWriter
from anneal_client.errors import ConversionFailed
from anneal_client.prepared import Dataset

_LABELS = ("labels", "label", "target", "targets", "y")


def from_dataloader(
    loader: Iterable[Any],
    inputs: Sequence[str] | None = None,
    *,
    labels: str | bool = True,
    name: str = "data",
    max_samples: int | None = None,
) -> Dataset:
    """A data set of the batches of a DataLoader, or of any iterable of batches, which is gone through once.

    `inputs`: the names of the model's inputs. A batch may be a mapping (then its keys are the names, and `inputs` picks
    some of them), a tensor, or a tuple: so many tensors as there are inputs and, after them, the labels; also
    (inputs, labels), the inputs being a mapping or a tuple. `labels`: True takes them where they are, a name says under
    which key, False leaves them out. Batches of unlike lengths come into shards of their own. Raises
    `ConversionFailed`.
    """
    writer = ShardWriter(name, max_samples=max_samples)
    for batch in loader:
        writer.add(named(batch, inputs, labels))
        if writer.full:
            break
    return writer.finish()


def named(batch: Any, inputs: Sequence[str] | None, labels: str | bool) -> dict[str, Any]:
    """The arrays of one batch by the names that a data set has for them."""
    if isinstance(batch, Mapping):
        return _of_mapping(batch, inputs, labels)
    if not isinstance(batch, tuple | list):
        batch = (batch,)
    if len(batch) == 2 and isinstance(batch[0], Mapping | tuple | list):
        found = named(batch[0], inputs, False)
        return found if labels is False else {**found, "labels": batch[1]}
    if inputs is None:
        raise ConversionFailed(
            "inputs_unnamed",
            f"A batch holds {len(batch)} arrays without names.",
            remedy="Name the model's inputs in their order: inputs=['x'].",
        )
    if not len(inputs) <= len(batch) <= len(inputs) + 1:
        remedy = "Name as many inputs as a batch has, without the labels at its end."
        detail = f"A batch holds {len(batch)} arrays, named are {len(inputs)}: {', '.join(inputs)}."
        raise ConversionFailed("inputs_differ", detail, remedy=remedy)
    found = dict(zip(inputs, batch, strict=False))
    if len(batch) > len(inputs) and labels is not False:
        found["labels"] = batch[-1]
    return found


def _of_mapping(batch: Mapping[str, Any], inputs: Sequence[str] | None, labels: str | bool) -> dict[str, Any]:
    if isinstance(labels, str):
        key = labels if labels in batch else None
        wanted = [labels]
    else:
        wanted = [n for n in _LABELS if n not in (inputs or ())]
        key = next((n for n in wanted if n in batch), None) if labels else None
    names = inputs if inputs is not None else [n for n in batch if n not in wanted]
    missing = [n for n in names if n not in batch] or ([labels] if isinstance(labels, str) and key is None else [])
    if missing:
        raise ConversionFailed("names_missing", f"A batch has {', '.join(map(str, batch))}, not {', '.join(missing)}.")
    found = {n: batch[n] for n in names}
    return found if key is None else {**found, "labels": batch[key]}
