"""
manifest.json, the last file that is written into a checkpoint: size and SHA-256 of each of the others. A directory
without a manifest that fits was not finished, or was damaged since, and is never loaded.

    write_manifest(directory)     hashes what is there, flushes it to the disk, then writes the manifest
    check_manifest(directory)     None where all is as it was written, else one line that says what isn't
"""

import json
import os
from pathlib import Path, PurePosixPath

from mlx_grpo.files import sha256, sync_directory

NAME = "manifest.json"
FORMAT = 1
MAX_BYTES = 16 << 20         # of a manifest; a real one has about 2 kB
READ_BY_LOADERS = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".npz", ".bin", ".pkl", ".py")


def manifest_text(files):
    """The one way a manifest is written, so that any other byte in it shows."""
    return json.dumps({"format": FORMAT, "files": dict(sorted(files.items()))}, indent=1) + "\n"


def files_below(directory):
    """Relative names, with "/", of the plain files in `directory` and its folders: no manifest, nothing hidden."""
    directory, names = Path(directory), set()
    for folder, folders, files in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(folder) / name for name in files if not name.startswith(".")]
        names |= {path.relative_to(directory).as_posix() for path in paths if path.is_file()}
    return names - {NAME}


def write_manifest(directory):
    """Write manifest.json for the files that are in `directory`. Each file is flushed to the disk first; the manifest
    appears whole, under its name, after them. An older manifest is replaced."""
    directory, files = Path(directory), {}
    for name in files_below(directory):
        path = directory / name
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    for folder in {(directory / name).parent for name in files}:
        sync_directory(folder)
    work = directory / f".{NAME}.tmp"
    with open(work, "w", encoding="utf-8", newline="\n") as file:
        file.write(manifest_text(files))
        file.flush()
        os.fsync(file.fileno())
    os.replace(work, directory / NAME)
    sync_directory(directory)


def check_manifest(directory, quick=False):
    """None where every file that the manifest of `directory` lists is there with its size and hash, and no file is
    there that a loader would read and the manifest doesn't list; else one line that says what is wrong, without
    the directory. A directory without a manifest gives "no manifest.json". `quick` compares sizes, not hashes."""
    directory = Path(directory)
    try:
        return first_fault(directory, quick)
    except OSError as error:
        name = Path(error.filename).name if error.filename else NAME
        return f"{name} can't be read: {error.strerror}"


def first_fault(directory, quick):
    path = directory / NAME
    if not path.is_file():
        return f"no {NAME}"
    files = read_manifest(path)
    if isinstance(files, str):
        return files
    there = files_below(directory)
    missing = sorted(set(files) - there)
    if missing:
        return f"{missing[0]} is missing" + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
    unlisted = sorted(name for name in there - set(files) if name.endswith(READ_BY_LOADERS))
    if unlisted:
        return f"{unlisted[0]} is not in {NAME}: it was added later, or {NAME} is incomplete"
    for name, entry in sorted(files.items()):
        size = (directory / name).stat().st_size
        if size != entry["size"]:
            return f"{name} has {size} bytes, {NAME} says {entry['size']}"
    for name, entry in sorted(files.items()) if not quick else ():
        if sha256(directory / name) != entry["sha256"]:
            return f"{name} was changed: its SHA-256 differs from the one in {NAME}"
    return None


def read_manifest(path):
    """name -> {"size", "sha256"} of a manifest, or the line that says what is wrong with it."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        return f"{NAME} has {size} bytes, too many for a manifest"
    raw = path.read_bytes()
    try:
        table = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        return f"{NAME} is damaged or cut short: not readable as JSON"
    if not isinstance(table, dict) or not isinstance(table.get("files"), dict) or not table["files"]:
        return f"{NAME} lists no files"
    if table.get("format") != FORMAT:
        return f"{NAME} has format {table.get('format')!r:.40}; this version reads format {FORMAT}"
    for name, entry in table["files"].items():
        fits = isinstance(entry, dict) and type(entry.get("size")) is int and isinstance(entry.get("sha256"), str)
        if not fits or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"{NAME} is damaged: its entry {name!r:.80} is not the size and SHA-256 of a file in this directory"
    if manifest_text(table["files"]).encode() != raw:
        return f"{NAME} is damaged: it isn't as it was written"
    return table["files"]
