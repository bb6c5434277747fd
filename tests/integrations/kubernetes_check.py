"""Run in the environment `kubernetes`: `python kubernetes_check.py FILE…` ends with 1 where a manifest does not fit the
published schema of its kind; unknown fields count as faults.

A file may hold several. KServe's own Python SDK has the schema of an InferenceService (`openapi_types`), `cloudcoil`
has those of KEDA and of the Prometheus operator, `kubernetes-validate` those of Kubernetes itself (of an
InferenceService: of its containers, in a Pod).
"""

import importlib
import re
import sys
import types
from pathlib import Path

import kubernetes_validate
import yaml
from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as monitoring
from pydantic import BaseModel

KUBERNETES = "1.30"
BUILT_IN = {"v1", "apps/v1", "batch/v1", "policy/v1", "networking.k8s.io/v1"}
SIMPLE = {"str": str, "int": int, "bool": bool, "float": (int, float)}


def kserve_models():
    """The SDK's generated models, without what its client needs to be imported."""
    (folder,) = (Path(p) / "kserve" for p in sys.path if (Path(p) / "kserve" / "models").is_dir())
    package = types.ModuleType("kserve")
    package.__path__ = [str(folder)]
    sys.modules["kserve"] = package
    sys.modules["kserve.configuration"] = types.ModuleType("kserve.configuration")
    sys.modules["kserve.configuration"].Configuration = object
    six = types.ModuleType("six")
    six.iteritems = dict.items
    sys.modules["six"] = six
    models = types.ModuleType("kserve.models")
    models.__path__ = [str(folder / "models")]
    sys.modules["kserve.models"] = models

    def model(name):
        module = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
        return getattr(importlib.import_module(f"kserve.models.{module}"), name)

    return model


def faults_of(model, kind, value, path):
    """What does not fit the SDK's type `kind`; types of Kubernetes itself are left to its own schemas."""
    if found := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            return [f"{path} is no list"]
        return [f for i, item in enumerate(value) for f in faults_of(model, found[1], item, f"{path}[{i}]")]
    if found := re.fullmatch(r"dict\(str, (.+)\)", kind):
        return [f for k, item in value.items() for f in faults_of(model, found[1], item, f"{path}.{k}")]
    if kind in SIMPLE:
        fits = isinstance(value, SIMPLE[kind]) and (kind == "bool" or not isinstance(value, bool))
        return [] if fits else [f"{path} is {value!r}, no {kind}"]
    if not kind.startswith(("V1beta1", "V1alpha1")):
        return []
    schema = model(kind)
    names = {json: name for name, json in schema.attribute_map.items()}
    unknown = [f"{path}.{key} is unknown" for key in value if key not in names]
    known = [(key, item) for key, item in value.items() if key in names]
    return unknown + [
        f for key, item in known for f in faults_of(model, schema.openapi_types[names[key]], item, f"{path}.{key}")
    ]


def unknown_to(model, value, path):
    """Fields that a pydantic model does not have."""
    if isinstance(value, list):
        return [f for i, item in enumerate(value) for f in unknown_to(model, item, f"{path}[{i}]")]
    if not (isinstance(model, type) and issubclass(model, BaseModel)) or not isinstance(value, dict):
        return []
    fields = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    found = [f"{path}.{key} is unknown" for key in value if key not in fields]
    return found + [f for k, v in value.items() if k in fields for f in unknown_to(inner(fields[k]), v, f"{path}.{k}")]


def inner(annotation):
    """The model within Optional, Annotated and list."""
    while not isinstance(annotation, type) and getattr(annotation, "__args__", ()):
        annotation = next((a for a in annotation.__args__ if a is not type(None)), None)
    if getattr(annotation, "__args__", ()):
        return inner(annotation.__args__[0])
    return annotation


def faults(document):
    kind = document["kind"]
    if document["apiVersion"] in BUILT_IN:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return []
    if kind == "InferenceService":
        containers = document["spec"]["predictor"]["containers"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": containers}}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        return faults_of(kserve_models(), "V1beta1InferenceService", document, kind)
    known = {"ScaledObject": keda.ScaledObject, "PrometheusRule": monitoring.PrometheusRule}
    model = {**known, "PodMonitor": monitoring.PodMonitor}[kind]
    model.model_validate(document)
    return unknown_to(model, document, kind)


read = [(path, document) for path in sys.argv[1:] for document in yaml.safe_load_all(Path(path).read_text())]
found = [f"{path}: {fault}" for path, document in read for fault in faults(document)]
sys.stdout.write("\n".join([*found, ""]))
sys.exit(1 if found else 0)
