"""`serve.py` of a bundle, asked by Triton's own clients, over HTTP and gRPC: it speaks their protocol."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

from tests.factories.serving import FAILS, WAITS, bundle
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


GRPC = """
import sys
import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

client = triton.InferenceServerClient(sys.argv[1])
assert client.is_server_live() and client.is_server_ready()
assert client.is_model_ready("doubling") and client.is_model_ready("doubling", "1")
assert client.get_server_metadata().extensions == ["binary_tensor_data"]
told = client.get_model_metadata("doubling")
assert (told.platform, told.versions) == ("numpy", ["1"])
assert [(t.name, t.datatype, t.shape) for t in told.inputs] == [("x", "INT64", [-1, -1])]

def given(x):
    found = triton.InferInput("x", list(x.shape), "INT64")
    found.set_data_from_numpy(x)
    return [found]

for shape in ((2, 3), (1, 75_264)):
    x = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
    found = client.infer("doubling", given(x), request_id="7", timeout=5_000_000, client_timeout=30)
    assert found.get_response().id == "7"
    assert (found.as_numpy("y") == 2 * x + 1).all() and found.as_numpy("width").tolist() == [shape[1]] * shape[0]
found = client.infer("doubling", given(x), outputs=[triton.InferRequestedOutput("width")])
assert found.as_numpy("y") is None and found.as_numpy("width").tolist() == [75_264]

# Tensors that are not raw, which other clients send.
stub = client._client_stub
tensor = service_pb2.ModelInferRequest.InferInputTensor(name="x", datatype="INT64", shape=[1, 2])
tensor.contents.int64_contents.extend([3, 4])
answer = stub.ModelInfer(service_pb2.ModelInferRequest(model_name="doubling", inputs=[tensor]))
assert answer.raw_output_contents[0] == np.array([7, 9], np.int64).tobytes()

def refused(code, words, call, *given, **told):
    try:
        call(*given, **told)
    except InferenceServerException as error:
        assert code in error.status() and words in error.message(), error
    else:
        raise AssertionError(words)

small = np.array([[1, 2]], np.int64)
other = triton.InferInput("x", [1, 2], "FP32")
other.set_data_from_numpy(small.astype(np.float32))
refused("NOT_FOUND", "there is no model", client.infer, "other", given(small))
refused("NOT_FOUND", "version", client.infer, "doubling", given(small), "2")
refused("INVALID_ARGUMENT", "the model's is int64", client.infer, "doubling", [other])
refused("INVALID_ARGUMENT", "there is no output z", client.infer, "doubling", given(small),
        outputs=[triton.InferRequestedOutput("z")])
refused("INTERNAL", "inference_failed", client.infer, "doubling", given(np.array([[FAILS, 2]], np.int64)))
refused("DEADLINE_EXCEEDED", "", client.infer, "doubling", given(np.array([[WAITS, 2]], np.int64)), timeout=20_000)
refused("DEADLINE_EXCEEDED", "", client.infer, "doubling", given(np.array([[WAITS, 2]], np.int64)),
        client_timeout=0.02)
tensor.contents.Clear()
try:
    stub.ModelInfer(service_pb2.ModelInferRequest(model_name="doubling", inputs=[tensor]))
except Exception as error:
    assert "do not fill" in error.details(), error
else:
    raise AssertionError("an empty tensor")
print("all well")
"""


def test_triton_s_own_grpc_client_is_answered(tmp_path: Path) -> None:
    python = environment("triton-client") / "bin" / "python"
    folder = bundle(tmp_path, max_batch=8)
    command = [str(python), str(folder / "serve.py"), "--port", "0", "--grpc-port", "0"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            line = server.stdout.readline()
            found = re.search(r"grpc://(127\.0\.0\.1:\d+)", line)
            assert found, (line, server.poll(), server.stderr and server.stderr.read())
            script = f"FAILS, WAITS = {FAILS}, {WAITS}\n{GRPC}"
            done = subprocess.run(
                [str(python), "-c", script, found[1]], capture_output=True, text=True, timeout=120, check=False
            )
            assert (done.returncode, done.stdout) == (0, "all well\n"), done.stderr
            os.kill(server.pid, signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()
