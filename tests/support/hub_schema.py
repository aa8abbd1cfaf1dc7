"""What the Hub asks of the metadata at the top of a card; import as `hub_schema`.

By the Hub's own account it checks `license`, `datasets` and `model-index`; the form of the others is as its
documentation describes them.
"""

import re

import yaml

LICENSES = ("mit", "apache-2.0", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "other", "unknown")  # some
REPO_ID = re.compile(r"([\w.-]+/)?[\w.-]+")  # the oldest have no owner


def metadata_of(content):
    """Read the YAML at the top of a card."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    return yaml.safe_load(match[1]) if match else {}


def metadata_faults(content):
    """List in words what the Hub would not take."""
    try:
        data = metadata_of(content)
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    faults = [f"{key} is empty" for key, value in data.items() if value in (None, [], "")]
    if data.get("license", "mit") not in LICENSES:
        faults.append(f"license {data['license']!r} is not one of the Hub's")
    for key in ("base_model", "datasets"):
        faults += [f"{key} {name!r} is no id of the Hub" for name in _texts(data, key) if not REPO_ID.fullmatch(name)]
    for key in ("library_name", "pipeline_tag"):
        faults += [f"{key} is no text"] if not isinstance(data.get(key, ""), str) else []
    for example in data.get("widget") or []:
        if set(example) < {"src", "candidate_labels"} or not example["src"]:
            faults.append(f"widget: {example} is no image with labels")
    return faults + [fault for model in data.get("model-index") or [] for fault in _index_faults(model)]


def _texts(data, key):
    values = data.get(key) or []
    return list(map(str, [values] if isinstance(values, str) else values))


def _index_faults(model):
    if not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
        return ["model-index: name and results are required"]
    faults = []
    for result in model["results"]:
        for place, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
            faults += [
                f"model-index: {place}.{key} is required"
                for key in keys
                if not isinstance(result.get(place, {}).get(key), str)
            ]
        if not result.get("metrics"):
            faults.append("model-index: metrics are required")
        for metric in result.get("metrics") or []:
            if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), (int, float, str)):
                faults.append(f"model-index: {metric} has no type or no value")
    return faults
