"""The report page's part on a chain of models."""

from __future__ import annotations

from app.jobs.page_parts import Json, objects, part_of, rows_table, text

_MODELS = {"place": "", "name": "model", "format": "format", "given": "goes to", "takes": "takes", "gives": "gives"}
_PROGRAM = "pt2"
_ENGINES = {"backend": "engine for", "size_mb": "MB on disk"}
_SHIPS = {
    "merged": "One engine of the whole ships.",
    "ensemble": "An engine of each model ships; they were judged and measured as the chain that they are.",
}


def chain(told: Json) -> str:
    """What goes where, and what ships of it."""
    models = objects(told.get("models"))
    if not models:
        return ""
    rows = []
    for place, model in enumerate(models, 1):
        connect = model.get("connect")
        joints = connect.items() if isinstance(connect, dict) else ()
        rows.append(
            {
                "place": place,
                "name": model.get("name"),
                "format": model.get("format"),
                "given": "; ".join(f"{given} → {own}" for own, given in joints),
                "takes": model.get("taken"),
                "gives": [tensor.get("name") for tensor in objects(model.get("outputs"))],
                **{name: part_of(model, "engine").get(name) for name in _ENGINES},
            }
        )
    columns = _MODELS | (_ENGINES if any(row["backend"] for row in rows) else {})
    ships = _SHIPS.get(str(told.get("deploy")), "")
    why = f" {text(told['reason'])}." if told.get("reason") else ""
    programs = any(model.get("format") == _PROGRAM for model in models)
    became = " What was uploaded as .pt2 became ONNX first, and backends of .pt2 were not tried." if programs else ""
    said = f"{ships}{why}{became} The original that it is compared with is the chain of the originals in one graph."
    return f"<p class=sub>{said}</p>{rows_table(rows, columns, 8)}"
