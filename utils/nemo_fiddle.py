"""
io.json of a NeMo 2 checkpoint, a graph of configured objects in fiddle's serialisation: read and written as data.

    config_arguments(graph, where)   the arguments of the model's config; a class or function is {"_target_": its name}
    write_graph(Config(...))         the graph of nested Configs, as NeMo's own saver gives it
"""

import re

from mlx_grpo import UserError

ITEM = re.compile(r"(?:Attr\(name|Key\(key|Index\(index)=(.*)\)")
MAX_NODES = 100_000        # of one configuration; real ones have a few hundred


def config_arguments(graph, where):
    """The arguments of the model's config, as model.yaml would have them. Lists and mappings are read, other objects
    become None. Raises UserError where the graph isn't one of NeMo's."""
    try:
        objects = graph["objects"]
        node = next(o for o in objects.values() if "<root>.model.config" in (o.get("paths") or ()))
        return Reader(objects).value(node)
    except (KeyError, TypeError, AttributeError, StopIteration, IndexError, RecursionError) as error:
        raise UserError(f"{where} is not a context that NeMo saved ({type(error).__name__}: {error})") from error


class Reader:
    """Follows a graph's references, a bounded number of them: shared nodes could be made to multiply."""

    def __init__(self, objects):
        self.objects, self.visited = objects, 0

    def value(self, node):
        """What a node stands for. Raises KeyError and the like for one that isn't fiddle's."""
        self.visited += 1
        if self.visited > MAX_NODES:
            raise KeyError("too many nodes")
        kind = node["type"]
        if kind == "leaf":
            return node["value"]
        if kind == "ref":
            return self.value(self.objects[node["key"]])
        if kind == "pyref":
            return {"_target_": f"{node['module']}.{node['name']}", "_call_": False}
        items = [(ITEM.fullmatch(path).group(1).strip("'"), value) for path, value in node["items"]]
        if kind["name"] in ("list", "tuple"):
            return [self.value(value) if isinstance(value, dict) else value for _, value in items]
        values = {name: self.value(value) for name, value in items}
        if kind["name"] == "dict":
            return values
        if kind["name"] in ("Config", "Partial"):
            metadata = self.objects[node["metadata"]["key"]]
            target = next(value for path, value in metadata["items"] if "fn_or_cls" in path)
            return {"_target_": f"{target['module']}.{target['name']}"} | values
        return None


def write_graph(root):
    """The graph of a Config, with all that it holds."""
    graph = Graph()
    key = graph.add_value(root, "<root>")
    for nodes in graph.pyrefs.values():       # a name is one object in memory: each of its places lists all of them
        paths = [path for node in nodes for path in node["paths"]]
        for node in nodes:
            node["paths"] = paths
    return {"root": key, "objects": graph.objects, "refcounts": dict.fromkeys(graph.objects, 1), "version": "0.0.1"}


def pyref(target):
    """A name that fiddle resolves by import: "torch.float32"."""
    module, name = target.rsplit(".", 1)
    return {"type": "pyref", "module": module, "name": name}


EMPTY = {"type": pyref("builtins.tuple"), "items": [], "metadata": None}


class Config:
    """A fiddle Config: a callable's dotted name and its arguments."""

    def __init__(self, target, arguments):
        self.target, self.arguments = target, arguments


class Graph:
    """Fiddle's serialisation of Configs, lists, mappings and plain values, children before parents."""

    def __init__(self):
        self.objects, self.counts, self.pyrefs = {}, {}, {}

    def add(self, name, node):
        """Store an object under `<name>_<n>` and return the reference to it."""
        self.counts[name] = self.counts.get(name, 0) + 1
        key = f"{name}_{self.counts[name]}"
        self.objects[key] = node
        return {"type": "ref", "key": key}

    def add_value(self, value, path):
        """The node of a value at `path` below the root: inline for plain values and names, a reference for the rest."""
        if isinstance(value, dict) and "_target_" in value:
            if value.get("_call_") is False:
                node = pyref(value["_target_"]) | {"paths": [path]}
                self.pyrefs.setdefault(value["_target_"], []).append(node)
                return node
            value = Config(value["_target_"], {k: v for k, v in value.items() if k != "_target_"})
        if isinstance(value, Config):
            return self.add_config(value, path)
        if isinstance(value, dict):
            items = [[f"Key(key={k!r})", self.add_value(v, f"{path}[{k!r}]")] for k, v in value.items()]
            metadata = self.add_tuple(value) if value else EMPTY
            return self.add("dict", {"type": pyref("builtins.dict"), "items": items, "metadata": metadata,
                                     "paths": [path]})
        if isinstance(value, list):
            items = [[f"Index(index={i})", self.add_value(v, f"{path}[{i}]")] for i, v in enumerate(value)]
            return self.add("list", {"type": pyref("builtins.list"), "items": items, "metadata": None, "paths": [path]})
        return {"type": "leaf", "value": value, "paths": [path]}

    def add_tuple(self, names):
        """A tuple of plain strings."""
        return self.add("tuple", {"type": pyref("builtins.tuple"), "metadata": None,
                                  "items": [[f"Index(index={i})", name] for i, name in enumerate(names)]})

    def add_config(self, config, path):
        """A Config with what fiddle keeps of each: argument names, and two empty mappings."""
        items = [[f"Attr(name={k!r})", self.add_value(v, f"{path}.{k}")] for k, v in config.arguments.items()]
        names = self.add_tuple(config.arguments)
        tags, history = (self.add("dict", {"type": pyref("builtins.dict"), "items": [], "metadata": EMPTY})
                         for _ in range(2))
        kind = pyref("fiddle._src.config.BuildableTraverserMetadata")
        metadata = self.add("buildable_traverser_metadata", {"type": kind, "metadata": kind, "items": [
            ["Attr(name='fn_or_cls')", pyref(config.target)], ["Attr(name='argument_names')", names],
            ["Attr(name='argument_tags')", tags], ["Attr(name='argument_history')", history]]})
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", config.target.rsplit(".", 1)[-1]).lower()
        return self.add(name, {"type": pyref("fiddle._src.config.Config"), "items": items, "metadata": metadata,
                               "paths": [path]})
