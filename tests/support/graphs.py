"""ComfyUI graphs as files: the schema they must fit, what is wrong with one, and its API form."""

from __future__ import annotations

from typing import Any

# Node types that exist in the page only.
PAGE_NODES = {"MarkdownNote", "Note", "Reroute"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
GROWING = "COMFY_AUTOGROW_V3"


def inputs_of(schema: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any], bool]]:
    """Input name -> (type, options, is required), in the order of the node's widgets; growing inputs are spread out."""
    found: dict[str, tuple[Any, dict[str, Any], bool]] = {}
    for group in ("required", "optional"):
        for name in schema["input_order"].get(group, []):
            kind, options = schema["input"][group][name][0], (schema["input"][group][name] + [{}])[1]
            if kind == GROWING:
                template = options["template"]
                inner = next(iter(next(iter(template["input"].values())).values()))
                for number in range(template["max"]):
                    is_required = number < template["min"]
                    found[f"{name}.{template['prefix']}{number}"] = (inner[0], inner[1], is_required)
            else:
                found[name] = (kind, options, group == "required")
    return found


def is_widget(kind: Any, options: dict[str, Any]) -> bool:
    """Whether an input is a widget rather than a socket."""
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")


def widget_names(schema: dict[str, Any]) -> list[str]:
    """Names of a node's widget values in saved order; a seed has the extra "control_after_generate"."""
    names = []
    for name, (kind, options, _) in inputs_of(schema).items():
        if not is_widget(kind, options):
            continue
        names.append(name)
        if options.get("control_after_generate") or (kind == "INT" and name in ("seed", "noise_seed")):
            names.append("control_after_generate")
        if options.get("image_upload"):
            names.append("upload")
    return names


def links_of(graph: dict[str, Any]) -> dict[int, tuple[int, int, int, int, str]]:
    """Link id -> (from node, output, to node, input, type)."""
    return {link[0]: tuple(link[1:]) for link in graph["links"]}


def to_api(graph: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """What the page would queue for a saved graph."""
    links = links_of(graph)
    prompt = {}
    for node in graph["nodes"]:
        if node["type"] in PAGE_NODES:
            continue
        names = widget_names(schemas[node["type"]])
        values = dict(zip(names, node.get("widgets_values", []), strict=False))
        inputs = {
            name: value for name, value in values.items() if name not in ("control_after_generate", "upload")
        }
        for entry in node.get("inputs", []):
            if entry.get("link") is not None:
                source, output, *_ = links[entry["link"]]
                inputs[entry["name"]] = [str(source), output]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def problems(graph: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    """Everything in a saved graph that does not fit the schemas, in words."""
    found = []
    nodes = {node["id"]: node for node in graph["nodes"]}
    for node in graph["nodes"]:
        if node["type"] in PAGE_NODES:
            continue
        if node["type"] not in schemas:
            found.append(f"there is no node type {node['type']}")
            continue
        found += [
            f"{node['type']} {node['id']}: {problem}"
            for problem in _node_problems(node, schemas[node["type"]])
        ]
    for number, (source, output, target, place, kind) in links_of(graph).items():
        outputs = schemas[nodes[source]["type"]]["output"]
        if output >= len(outputs):
            found.append(
                f"link {number} leaves {nodes[source]['type']} at output {output}, it has {len(outputs)}"
            )
            continue
        entry = nodes[target]["inputs"][place]
        expected = inputs_of(schemas[nodes[target]["type"]])[entry["name"]][0]
        if entry["link"] != number:
            found.append(f"link {number} is unknown to input {entry['name']} of {nodes[target]['type']}")
        if number not in nodes[source]["outputs"][output]["links"]:
            found.append(f"link {number} is unknown to output {output} of {nodes[source]['type']}")
        if not {kind, outputs[output], expected} <= {kind, "*"} and expected != "*":
            found.append(
                f"link {number} is {kind}, leaves as {outputs[output]} and enters {entry['name']} as {expected}"
            )
    return found


def _node_problems(node: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    found = []
    known = inputs_of(schema)
    names, values = widget_names(schema), node.get("widgets_values", [])
    if len(values) != len(names):
        return [f"{len(values)} widget values for the widgets {names}"]
    for name, value in zip(names, values, strict=True):
        if name in ("control_after_generate", "upload"):
            if name == "control_after_generate" and value not in (
                "fixed",
                "increment",
                "decrement",
                "randomize",
            ):
                found.append(f"{value} after the seed is no way to change it")
            continue
        found += _value_problems(name, value, *known[name][:2])
    linked = {entry["name"] for entry in node.get("inputs", []) if entry.get("link") is not None}
    for entry in node.get("inputs", []):
        if entry["name"] not in known:
            found.append(f"there is no input {entry['name']}")
    for name, (kind, options, is_required) in known.items():
        if is_required and not is_widget(kind, options) and name not in linked:
            found.append(f"input {name} is not connected")
    outputs = [entry["type"] for entry in node.get("outputs", [])]
    if outputs != schema["output"]:
        found.append(f"outputs {outputs}, expected {schema['output']}")
    return found


def _value_problems(name: str, value: Any, kind: Any, options: dict[str, Any]) -> list[str]:
    choices = kind if isinstance(kind, list) else options.get("options")
    types = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
    if choices is not None:
        return [] if value in choices else [f"{name} is {value!r}, not one of {choices[:5]} ..."]
    if not isinstance(value, types[kind]) or (kind == "INT" and isinstance(value, bool)):
        return [f"{name} is {value!r}, expected {kind}"]
    if kind in ("INT", "FLOAT") and not options.get("min", value) <= value <= options.get("max", value):
        return [f"{name} is {value}, outside {options.get('min')} ... {options.get('max')}"]
    return []
