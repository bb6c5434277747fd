"""Models of Hugging Face's transformers, from a folder or as they were loaded."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from anneal_client.errors import ConversionFailed
from anneal_client.exporting.checks import need
from anneal_client.exporting.pytorch import from_torch
from anneal_client.prepared import ExportedModel

TEXTS = ("An engine that keeps its promise.", "A second sentence, which is somewhat longer than the first one.")


def from_huggingface(
    model: str | os.PathLike[str] | Any,
    example_inputs: Mapping[str, Any] | None = None,
    *,
    outputs: Sequence[str] | None = None,
    format: Literal["onnx", "pt2"] = "onnx",
    name: str | None = None,
    tolerance: float | None = None,
) -> ExportedModel:
    """A model in a folder as `save_pretrained` writes it (its class is what its `config.json` says), or one that was
    loaded, exported by torch and held against itself.

    `example_inputs`: tensors by input. Without them two sentences go through the folder's tokenizer, or two pictures
    of noise have the size that the configuration says. The batch and the length of text vary in the export.
    `outputs`: those of the model's answer to keep; without it all tensors but past keys and hidden states. Code that
    lies in the folder is never run. Needs the extra `huggingface`. Raises `ConversionFailed`.
    """
    torch, transformers = need("torch", "huggingface"), need("transformers", "huggingface")
    folder = Path(model) if isinstance(model, str | os.PathLike) else None
    if folder is not None:
        model = _loaded(transformers, folder)
    inputs = dict(example_inputs) if example_inputs is not None else _example(torch, transformers, model, folder)
    shapes = _shapes(inputs)
    wrapped = _wrapper(torch, model, list(inputs), outputs)
    stem = name or (folder.name if folder is not None else type(model).__name__.lower())
    return from_torch(wrapped, inputs, shapes, format=format, name=stem, tolerance=tolerance)


def _loaded(transformers: Any, folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ConversionFailed(
            "no_huggingface_folder",
            f"There is no config.json in {folder}.",
            remedy="Give the folder that save_pretrained wrote; a name of the hub is not downloaded.",
        )
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if kind is None:
        detail = f"transformers {transformers.__version__} has no class {names[0]}."
        raise ConversionFailed(
            "unknown_architecture", detail, remedy="Load the model and give it instead of its folder."
        )
    # Scaled dot-product attention as written out: what every exporter takes.
    return kind.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()


def _example(torch: Any, transformers: Any, model: Any, folder: Path | None) -> dict[str, Any]:
    config = model.config
    if getattr(model, "main_input_name", "") == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        generator = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=generator)}
    if getattr(model, "main_input_name", "") != "input_ids":
        raise ConversionFailed(
            "example_needed",
            f"What {type(model).__name__} takes ({getattr(model, 'main_input_name', 'unknown')}) is not made here.",
            remedy="Give example_inputs={'input_name': tensor, ...}.",
        )
    if folder is not None and any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return dict(tokenizer(list(TEXTS), padding=True, return_tensors="pt"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _shapes(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The batch, and of text its length, vary."""
    main = inputs.get("input_ids")
    return {
        name: {0: "batch", 1: "sequence"} if main is not None and value.shape == main.shape else {0: "batch"}
        for name, value in inputs.items()
    }


def _wrapper(torch: Any, model: Any, names: list[str], outputs: Sequence[str] | None) -> Any:
    """The model with the named inputs and a dict of the wanted tensors."""
    skipped = {"past_key_values", "hidden_states", "attentions", "cross_attentions"}

    class Exportable(torch.nn.Module):  # type: ignore[misc]  # torch is not there when types are checked
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Any, **named: Any) -> dict[str, Any]:
            inputs = {**dict(zip(names, args, strict=False)), **named}
            answer = self.model(**inputs, **({"use_cache": False} if caches else {}), return_dict=True)
            kept = outputs or [n for n, v in answer.items() if n not in skipped and isinstance(v, torch.Tensor)]
            return {n: answer[n] for n in kept}

    # The parameters' names become those of the inputs.
    places = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("self", *names)]
    Exportable.forward.__signature__ = inspect.Signature(places)  # type: ignore[attr-defined]
    caches = bool(getattr(model.config, "use_cache", False))
    return Exportable()
