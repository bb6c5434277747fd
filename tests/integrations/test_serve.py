"""`serve.py` of a bundle, asked by Triton's own client: the protocol is the one that it speaks."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.factories.serving import bundle
from tests.integrations.environments import environment
from tests.unit.test_serve import serving

CLIENT = """
import sys
import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

client = triton.InferenceServerClient(sys.argv[1])
assert client.is_server_live() and client.is_server_ready()
assert client.is_model_ready("doubling") and client.is_model_ready("doubling", "1")
assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
told = client.get_model_metadata("doubling")
assert [(t["name"], t["datatype"], t["shape"]) for t in told["inputs"]] == [("x", "INT64", [-1, -1])]

x = np.arange(6, dtype=np.int64).reshape(2, 3)
for sent in (True, False):
    given = triton.InferInput("x", [2, 3], "INT64")
    given.set_data_from_numpy(x, binary_data=sent)
    for back in (True, False):
        wanted = [triton.InferRequestedOutput("y", binary_data=back)]
        found = client.infer("doubling", [given], outputs=wanted, request_id="7", timeout=5_000_000)
        assert found.get_response()["id"] == "7"
        assert (found.as_numpy("y") == 2 * x + 1).all() and found.as_numpy("width") is None
    assert client.infer("doubling", [given]).as_numpy("width").tolist() == [3, 3]
asked = [client.async_infer("doubling", [given]) for _ in range(8)]
assert all((a.get_result().as_numpy("y") == 2 * x + 1).all() for a in asked)

other = triton.InferInput("x", [1, 3], "FP32")
other.set_data_from_numpy(np.zeros((1, 3), np.float32))
for model, inputs, words in (("doubling", [other], "the model's is int64"), ("other", [given], "there is no model")):
    try:
        client.infer(model, inputs)
    except InferenceServerException as error:
        assert words in error.message(), error
    else:
        raise AssertionError(model)
"""


def test_triton_s_own_client_is_answered(tmp_path: Path) -> None:
    python = environment("triton-client") / "bin" / "python"
    with serving(bundle(tmp_path, max_batch=8)) as server:
        command = [str(python), "-c", CLIENT, f"127.0.0.1:{server.port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
