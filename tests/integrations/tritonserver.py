"""A real Triton on a machine without a GPU: the server of the wheel `nvidia-pytriton`, with stand-ins of the two
backends that no wheel carries (`standins/`)."""

from __future__ import annotations

import shutil
import stat
import sys
import sysconfig
from pathlib import Path

from tests.integrations.environments import environment

_STANDINS = Path(__file__).with_name("standins")
_SCRIPT = """#!/bin/sh
export PATH={bin}:$PATH PYTHONPATH={site}
export LD_LIBRARY_PATH={site}/nvidia_pytriton.libs:{libdir}
exec {triton}/bin/tritonserver --backend-directory {triton}/backends "$@"
"""


def tritonserver() -> Path:
    """A script that starts the server with the arguments given."""
    folder = environment("triton")
    (site,) = (folder / "lib").glob("python*/site-packages")
    triton = site / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = triton / "backends" / "python" / "triton_python_backend_stub"
    shutil.copyfile(triton / "python_backend_stubs" / version / stub.name, stub)
    stub.chmod(0o755)
    for name in ("onnxruntime", "openvino"):
        backend = triton / "backends" / name
        backend.mkdir(exist_ok=True)
        shutil.copyfile(_STANDINS / f"{name}_backend.py", backend / "model.py")
    shutil.copyfile(_STANDINS / "standin.py", site / "standin.py")
    script = folder / "bin" / "tritonserver"
    script.write_text(
        _SCRIPT.format(
            bin=folder / "bin",
            site=site,
            libdir=sysconfig.get_config_var("LIBDIR"),
            triton=triton,
        )
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script
