from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from imager.errors import SourceError
from imager.lab import changes, tree
from imager.lab.workload import SYSTEM, Filler

MIB = 1 << 20


def filled(root: Path, seed: int = 1, budget: int = 6 * MIB) -> Path:
    root.mkdir()
    Filler(root, seed, lambda written: None).posix(SYSTEM["ext4"], budget)
    return root


def test_a_tree_holds_something_of_everything(tmp_path: Path) -> None:
    told: list[int] = []
    root = tmp_path / "t"
    root.mkdir()
    stock = Filler(root, 1, told.append).posix(SYSTEM["ext4"], 6 * MIB)
    listing = tree.scan(root)
    kinds = {node.kind for node in listing.values()}
    assert kinds == {"file", "folder", "link"}
    assert stock.files == sum(node.kind == "file" for node in listing.values()) - stock.hard_links
    assert stock.symlinks == sum(node.kind == "link" for node in listing.values())
    assert stock.bytes == sum(told) and 4 * MIB < stock.bytes < 8 * MIB
    assert any(path.startswith("usr/") for path in listing)
    assert listing["links/name-0"].links == 2
    large = root / "sparse/disk.img"
    assert large.stat().st_blocks * 512 < large.stat().st_size
    assert listing["odd/private"].mode == stat.S_IFREG | 0o600
    assert "odd/name with  blanks" in listing


def test_the_same_seed_makes_the_same_tree(tmp_path: Path) -> None:
    a, b, c = (tree.scan(filled(tmp_path / str(n), seed)) for n, seed in enumerate((1, 1, 2)))
    assert tree.compare(tree.bare(a), tree.bare(b)) == []
    assert tree.compare(tree.bare(a), tree.bare(c)) != []


def test_changes_do_what_they_say(tmp_path: Path) -> None:
    root = filled(tmp_path / "t")
    for number in (1, 2):
        before = tree.scan(root)
        planned = changes.plan(root, number, 5)
        assert planned == changes.plan(root, number, 5)
        changes.apply(root, planned)
        after = tree.scan(root)
        assert set(changes.summary(planned)) == {
            changes.MKDIR,
            changes.CREATE,
            changes.DELETE,
            changes.OVERWRITE,
            changes.APPEND,
            changes.RENAME,
            changes.CHMOD,
        }
        for change in planned:
            was, now = before.get(change.path), after.get(change.path)
            if change.what in (changes.MKDIR, changes.CREATE):
                assert was is None and now is not None
            elif change.what == changes.DELETE:
                assert was is not None and now is None
            elif change.what == changes.RENAME:
                assert was is not None and now is None
                assert after[change.to].content == was.content
            elif change.what == changes.CHMOD:
                assert was and now and was.mode != now.mode and was.content == now.content
            elif change.what == changes.APPEND:
                assert was and now and now.size == was.size + len(change.data)
            else:
                assert was and now and now.size == was.size and now.content != was.content
        touched = {change.path for change in planned} | {change.to for change in planned}
        differing = {line.split(": ")[0] for line in tree.compare(before, after)}
        folders = {path for path, node in (before | after).items() if node.kind == "folder"}
        assert differing - folders <= touched


def test_a_comparison_names_what_differs(tmp_path: Path) -> None:
    root = filled(tmp_path / "t", budget=MIB)
    before = tree.scan(root)
    (root / "odd/empty").write_bytes(b"!")
    (root / "odd/new").write_bytes(b"")
    (root / "odd/private").unlink()
    (root / "links/dangling").unlink()
    (root / "links/dangling").symlink_to("other")
    os.chmod(root / "many/000/000000.txt", 0o600)
    os.utime(root / "odd", ns=(0, before["odd"].modified))
    os.utime(root / "links", ns=(0, before["links"].modified))
    lines = tree.compare(before, tree.scan(root))
    assert [line for line in lines if not line.startswith("links/dangling")] == [
        "many/000/000000.txt: mode",
        "odd/empty: size, content, modified",
        "odd/new: should not be there",
        "odd/private: missing",
    ]
    assert any(line.startswith("links/dangling: content") for line in lines)


def test_a_missing_folder_is_an_error_and_no_empty_tree(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        tree.scan(tmp_path / "no")


def test_an_efi_partition_takes_every_kind_of_change_twice(tmp_path: Path) -> None:
    Filler(tmp_path, 1, lambda written: None).fat(8 * MIB)
    for number in (1, 2):
        planned = changes.plan(tmp_path, number, 1)
        changes.apply(tmp_path, planned)
        assert changes.summary(planned)[changes.DELETE] == 25
        assert changes.summary(planned)[changes.CHMOD] == 6
