"""What a file tree holds, so that two of them can be compared.

Invariant: a listing is complete: whatever cannot be read is an error, never
a missing entry. Only ext4's own `lost+found` is left out.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat

from msgspec import Struct

from imager.errors import SourceError

_CHUNK = 1 << 20


class Node(Struct, frozen=True):
    """One entry of a tree. `content` is a file's digest or a link's target."""

    kind: str  # file, folder, link, other
    size: int  # of a file, in bytes
    content: str
    mode: int = 0
    owner: tuple[int, int] = (0, 0)
    links: int = 0
    modified: int = 0  # nanoseconds
    attributes: tuple[tuple[str, bytes], ...] = ()

    def bare(self) -> Node:
        """Without what a copy made by a file extractor does not carry."""
        return Node(self.kind, self.size, self.content)


Listing = dict[str, Node]


def scan(root: str | os.PathLike[str]) -> Listing:
    """List everything below `root` by its path from there. Raises `SourceError`."""
    listing: Listing = {}
    top = os.fspath(root)
    pending = [""]
    try:
        while pending:
            folder = pending.pop()
            with os.scandir(os.path.join(top, folder)) as entries:
                for entry in entries:
                    path = os.path.join(folder, entry.name)
                    if path == "lost+found":
                        continue
                    node = _node(entry)
                    listing[path] = node
                    if node.kind == "folder":
                        pending.append(path)
    except OSError as error:
        raise SourceError(f"cannot read {error.filename}: {error.strerror}") from error
    return listing


def bare(listing: Listing) -> Listing:
    """The listing with kinds, sizes and contents only."""
    return {path: node.bare() for path, node in listing.items()}


def compare(expected: Listing, found: Listing) -> list[str]:
    """The paths that differ, each with what differs, in order. Empty where the trees are equal."""
    problems = []
    for path in sorted(expected.keys() | found.keys()):
        a, b = expected.get(path), found.get(path)
        if a is None:
            problems.append(f"{path}: should not be there")
        elif b is None:
            problems.append(f"{path}: missing")
        elif a != b:
            fields = [name for name in Node.__struct_fields__ if getattr(a, name) != getattr(b, name)]
            problems.append(f"{path}: {', '.join(fields)}")
    return problems


def _node(entry: os.DirEntry[str]) -> Node:
    info = entry.stat(follow_symlinks=False)
    kind, size, content = "other", 0, ""
    if stat.S_ISREG(info.st_mode):
        kind, size, content = "file", info.st_size, _digest(entry.path)
    elif stat.S_ISDIR(info.st_mode):
        kind = "folder"
    elif stat.S_ISLNK(info.st_mode):
        kind, content = "link", os.readlink(entry.path)
    return Node(
        kind,
        size,
        content,
        info.st_mode,
        (info.st_uid, info.st_gid),
        info.st_nlink if kind == "file" else 0,
        info.st_mtime_ns,
        _attributes(entry.path),
    )


def _attributes(path: str) -> tuple[tuple[str, bytes], ...]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:  # a filesystem without attributes
            return ()
        raise
    return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in sorted(names))


def _digest(path: str) -> str:
    state = hashlib.blake2b(digest_size=20)
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_CHUNK):
            state.update(piece)
    return state.hexdigest()
