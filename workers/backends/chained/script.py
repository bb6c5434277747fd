"""The `infer.py` of a bundle with an engine of each model of a chain: each has its own beside it, whose `load` it
takes."""

from __future__ import annotations

import json
from collections.abc import Sequence

from workers.backends import bundle_script
from workers.backends.several import ENGINE_OF

_HEAD = '''
# The folders of the engines in the order of the chain; inputs and outputs of the whole.
CHAIN = json.loads(r"""__CHAIN__""")

'''
_LOAD = '''

def load(threads=None):
    """Names of the inputs, and a function from arrays by name to outputs by name, which many threads may call. What an
    engine gives goes to the next one. `threads`: that compute, where it is not as many as were measured."""
    loaded = [engine_of(folder).load(threads) for folder in CHAIN["folders"]]
    outputs = CHAIN["outputs"]

    def run(feeds):
        known = dict(feeds)
        for names, engine in loaded:
            known.update(engine({name: known[name] for name in names}))
        return {name: known[name] for name in outputs}

    return CHAIN["inputs"], run
'''


def infer_script(folders: Sequence[str], inputs: Sequence[str], outputs: Sequence[str]) -> str:
    """Source of `infer.py` for engines that lie in these folders, with an `infer.py` each."""
    told = {"folders": [*folders], "inputs": [*inputs], "outputs": [*outputs]}
    return bundle_script.infer_script(
        library="and what the engines' own infer.py need (requirements.txt lists it)",
        imports="import importlib.util",
        loader=_HEAD.replace("__CHAIN__", json.dumps(told, indent=2, sort_keys=True, ensure_ascii=True))
        + ENGINE_OF
        + _LOAD,
    )
