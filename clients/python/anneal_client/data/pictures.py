"""A folder of pictures; folders in it are classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from anneal_client.data.shards import ShardWriter
from anneal_client.errors import ConversionFailed
from anneal_client.exporting.checks import need
from anneal_client.prepared import Dataset

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
_ROWS = 32


def from_pictures(
    folder: str | Path,
    input: str,
    size: tuple[int, int] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    scale: float = 1 / 255,
    layout: Literal["NCHW", "NHWC"] = "NCHW",
    mode: str = "RGB",
    crop: float = 1.0,
    transform: Callable[[Any], Any] | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    max_samples: int | None = None,
) -> Dataset:
    """A data set of the pictures in `folder`, in the order of their names.

    `input`: the model's input. Do what the model's own preparation does, since what is measured is the model on these
    numbers: `size` (height, width), after cutting the middle `crop` of the shorter side's square; `scale`, `mean` and
    `std` (of each channel, after `scale`); `layout`; `mode` ("RGB", "L"). Or `transform`, from a picture of Pillow to
    one array, does it all.

    Pictures in folders of their own have labels: the place of the folder's name in `classes` (those there are, sorted).
    With `max_samples`, each class gives as many as it can. Needs the extra `pictures`. Raises `ConversionFailed`.
    """
    np, image = need("numpy", "data"), need("PIL.Image", "pictures")
    root = Path(folder)
    files, labels = _files(root, classes, max_samples)
    writer = ShardWriter(name or root.name or "pictures", max_samples=max_samples)
    for start in range(0, len(files), _ROWS):
        made = []
        for file in files[start : start + _ROWS]:
            try:
                with image.open(file) as opened:
                    picture = opened.convert(mode)
            except OSError as broken:
                raise ConversionFailed("unreadable_picture", f"{file}: {broken}.", remedy="Remove it.") from broken
            if transform is None:
                made.append(_array(np, image, picture, size, crop, scale, mean, std, layout))
            else:
                made.append(np.asarray(transform(picture)))
        kept = labels[start : start + _ROWS] if labels is not None else None
        for shape in dict.fromkeys(m.shape for m in made):
            of_shape = [i for i, m in enumerate(made) if m.shape == shape]
            batch = {input: np.stack([made[i] for i in of_shape])}
            if kept is not None:
                batch["labels"] = np.asarray([kept[i] for i in of_shape], dtype=np.int64)
            writer.add(batch)
    return writer.finish()


def _array(
    np: Any,
    image: Any,
    picture: Any,
    size: tuple[int, int] | None,
    crop: float,
    scale: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    layout: str,
) -> Any:
    if size is not None:
        height, width = size
        # The largest box of the wanted proportions, in the middle.
        w, h = picture.size
        share = min(w / width, h / height) * crop
        left, top = (w - width * share) / 2, (h - height * share) / 2
        box = (left, top, left + width * share, top + height * share)
        picture = picture.resize((width, height), image.Resampling.BILINEAR, box=box)
    array = np.asarray(picture, dtype=np.float32) * np.float32(scale)
    if array.ndim == 2:
        array = array[:, :, None]
    if mean is not None:
        array = array - np.asarray(mean, dtype=np.float32)
    if std is not None:
        array = array / np.asarray(std, dtype=np.float32)
    return np.ascontiguousarray(array.transpose(2, 0, 1) if layout == "NCHW" else array)


def _files(root: Path, classes: Sequence[str] | None, most: int | None) -> tuple[list[Path], list[int] | None]:
    """The pictures and, where they lie in folders, their labels."""
    if not root.is_dir():
        raise ConversionFailed("no_folder", f"There is no folder {root}.")
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and _pictures(p))
    names = list(classes) if classes is not None else folders
    if unknown := [f for f in folders if f not in names]:
        raise ConversionFailed("unknown_class", f"The folders {', '.join(unknown)} are not among `classes`.")
    if not folders:
        files = _pictures(root)
        if not files:
            known = ", ".join(sorted(SUFFIXES))
            raise ConversionFailed("no_pictures", f"There is no picture in {root} ({known}), nor in folders of it.")
        return files[:most], None
    by_class = [_pictures(root / folder) for folder in folders]
    # In turns: what the classes have in common decides how they are taken, not their names.
    turns = [
        (files[turn], names.index(folder))
        for turn in range(max(map(len, by_class)))
        for folder, files in zip(folders, by_class, strict=True)
        if turn < len(files)
    ]
    turns = turns[:most]
    return [file for file, _ in turns], [label for _, label in turns]


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
