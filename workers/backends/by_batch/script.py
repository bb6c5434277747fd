"""The `infer.py` of a bundle with several engines: each has its own beside it, whose `load` it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from workers.backends import bundle_script
from workers.backends.several import ENGINE_OF

_HEAD = '''
# Who answers batches of how many samples: the first one whose `most` holds them. `input`, `axis`: where that is read.
CHOICE = json.loads(r"""__CHOICE__""")

'''
_LOAD = '''

def load(threads=None):
    """Names of the inputs, and a function from arrays by name to outputs by name, which many threads may call. All
    engines are loaded, and each call goes to the one that is the fastest at its batch size. `threads`: that compute,
    where it is not as many as were measured."""
    loaded = [engine_of(engine["folder"]).load(threads) for engine in CHOICE["engines"]]
    runs = [(engine["most"], run) for engine, (_, run) in zip(CHOICE["engines"], loaded)]
    name, axis = CHOICE["input"], CHOICE["axis"]

    def run(feeds):
        size = np.shape(feeds[name])[axis]
        return next(run for most, run in runs if most is None or size <= most)(feeds)

    return loaded[0][0], run
'''


def infer_script(runtime: Mapping[str, Any]) -> str:
    """Source of `infer.py` for engines that lie in the folders that `runtime` names, with an `infer.py` each."""
    text = json.dumps(dict(runtime), indent=2, sort_keys=True, ensure_ascii=True)
    return bundle_script.infer_script(
        library="and what the engines' own infer.py need (requirements.txt lists it)",
        imports="import importlib.util",
        loader=_HEAD.replace("__CHOICE__", text) + ENGINE_OF + _LOAD,
    )
