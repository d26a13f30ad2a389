"""
Where a checkpoint's files lie: a directory, or an uncompressed tar read in place. Nothing is unpacked, no link is
followed, and JSON and YAML are read as data, within limits.
"""

import json
import os
import tarfile
from pathlib import Path

from mlx_grpo import UserError
from mlx_grpo.nemo_pickle import View

MAX_TEXT = 64 << 20         # bytes of a JSON file; a large tokenizer.json has 35 MB
MAX_YAML = 1 << 20          # bytes of a YAML file; real ones have 20 kB
MAX_DEPTH = 60              # of nested lists and mappings
MAX_MEMBERS = 8192          # of an archive


class Folder:
    """The plain files directly in one directory."""

    def __init__(self, path):
        self.path = Path(path)
        self.opened = {}

    def __str__(self):
        return str(self.path)

    def names(self):
        return sorted(p.name for p in self.path.iterdir() if p.is_file())

    def has(self, name):
        return (self.path / name).is_file()

    def folders(self):
        return sorted(p.name for p in self.path.iterdir() if p.is_dir())

    def sub(self, name):
        return Folder(self.path / name)

    def size(self, name):
        """Bytes of a file. Raises UserError for a name that isn't a plain file here: absent, a link, or with a
        separator."""
        path = self.path / name
        if not name or name != os.path.basename(name) or name in (".", ".."):
            raise UserError(f"{self}: {name!r} is not a bare file name; the checkpoint may be malicious")
        if path.is_symlink():
            raise UserError(f"{path} is a link; a checkpoint's files must be plain files")
        if not path.is_file():
            raise UserError(f"{path} is missing")
        return path.stat().st_size

    def view(self, name, start=0, length=None):
        """Bytes [start, start + length) of a file as a seekable binary file; the file stays open for the next call."""
        size = self.size(name)
        if name not in self.opened:
            self.opened[name] = open(self.path / name, "rb", buffering=0)
        return View(self.opened[name], start, size - start if length is None else length)

    def close(self):
        for file in self.opened.values():
            file.close()
        self.opened = {}


class TarFolder:
    """One directory of an archive: members whose names begin with `prefix`, by their bare names."""

    def __init__(self, path, members, prefix="", file=None):
        self.path, self.members, self.prefix = Path(path), members, prefix
        self.file = file or open(path, "rb", buffering=0)

    def __str__(self):
        return f"{self.path}:{self.prefix}" if self.prefix else str(self.path)

    def names(self):
        own = (name[len(self.prefix):] for name in self.members if name.startswith(self.prefix))
        return sorted(name for name in own if name and "/" not in name)

    def has(self, name):
        return self.prefix + name in self.members

    def folders(self):
        own = (name[len(self.prefix):] for name in self.members if name.startswith(self.prefix))
        return sorted({name.split("/")[0] for name in own if "/" in name})

    def sub(self, name):
        return TarFolder(self.path, self.members, f"{self.prefix}{name}/", self.file)

    def size(self, name):
        if not self.has(name) or "/" in name:
            raise UserError(f"{self} has no file {name!r}")
        return self.members[self.prefix + name].size

    def view(self, name, start=0, length=None):
        size = self.size(name)
        return View(self.file, self.members[self.prefix + name].offset_data + start, size - start
                    if length is None else length)

    def close(self):
        self.file.close()


def open_tar(path):
    """A .nemo archive as a TarFolder. Raises UserError for compression, links, devices, escaping or repeated names, and
    sizes that the file doesn't have."""
    path, size = Path(path), os.path.getsize(path)
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise UserError(f"{path} is gzip-compressed, as very old archives are; unpack it (tar xzf) and give the "
                            "directory")
    members = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = member.name[2:] if member.name.startswith("./") else member.name
                where = f"{path}: member {member.name!r}"
                if member.isdir() and ".." not in name.split("/") and not name.startswith("/"):
                    continue
                if not member.isreg() or member.issparse():
                    raise UserError(f"{where} is a link, a device or sparse; only plain files are read")
                if name.startswith("/") or "\\" in name or ".." in name.split("/") or "" in name.split("/"):
                    raise UserError(f"{where} would escape from the archive; it may be malicious and was not read")
                if name in members or len(members) >= MAX_MEMBERS:
                    raise UserError(f"{where} " + ("appears twice" if name in members else "is one of too many"))
                if member.offset_data + member.size > size:
                    raise UserError(f"{where} is cut short: the archive has {size} bytes")
                members[name] = member
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a readable tar archive: {error}") from error
    if not members:
        raise UserError(f"{path} is not a .nemo archive: it has no files")
    return TarFolder(path, members)


def check_depth(value, where):
    """Raises UserError for lists and mappings nested deeper than any real configuration."""
    level, layer = 0, [value]
    while layer:
        level, layer = level + 1, [v for item in layer if isinstance(item, (dict, list))
                                   for v in (item.values() if isinstance(item, dict) else item)]
        if level > MAX_DEPTH or len(layer) > 5_000_000:
            raise UserError(f"{where} is nested too deeply or too large")
    return value


def read_text(folder, name):
    size = folder.size(name)
    if size > MAX_TEXT:
        raise UserError(f"{folder}/{name} has {size} bytes, too many for a configuration")
    try:
        return folder.view(name).read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{folder}/{name} is not UTF-8 text") from error


def read_json(folder, name):
    try:
        return check_depth(json.loads(read_text(folder, name)), f"{folder}/{name}")
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{folder}/{name} is not valid JSON: {error}") from error


def read_yaml(folder, name):
    """A YAML mapping, by the safe loader. Aliases are refused: no real file has them and they can be made to
    explode."""
    import yaml
    if folder.size(name) > MAX_YAML:
        raise UserError(f"{folder}/{name} has {folder.size(name)} bytes, too many for a configuration")
    text, depth = read_text(folder, name), 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):       # stops at the first sign of a bomb
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH or isinstance(event, yaml.AliasEvent):
                raise UserError(f"{folder}/{name} " + ("is nested too deeply" if depth > MAX_DEPTH else
                                                       "has YAML aliases, which no checkpoint writes"))
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{folder}/{name} is not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(value, dict):
        raise UserError(f"{folder}/{name} is not a YAML mapping")
    return value
