"""The system that is installed on a filesystem: what recovery has to know of it.

Invariant: everything is bounded and plain text; a file that is missing or makes
no sense leaves its field empty.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from imager.filesystem.files import Files

_MOST = 256
_LONGEST = 512
_TOOLS = (
    ("initramfs-tools", "etc/initramfs-tools", "initramfs.conf"),
    ("dracut", "etc", "dracut.conf"),
    ("mkinitcpio", "etc", "mkinitcpio.conf"),
    ("booster", "etc", "booster.yaml"),
    ("tinyramfs", "etc", "tinyramfs"),
)
_LOADERS = (
    ("grub", "boot/grub", "grub.cfg"),
    ("grub", "boot/grub2", "grub.cfg"),
    ("grub", "grub", "grub.cfg"),
    ("grub", "grub2", "grub.cfg"),
    ("systemd-boot", "loader", "loader.conf"),
    ("syslinux", "boot/extlinux", "extlinux.conf"),
    ("syslinux", "extlinux", "extlinux.conf"),
    ("refind", "EFI/refind", "refind.conf"),
)


class Mount(Struct, frozen=True):
    """A line of fstab."""

    spec: str
    target: str
    type: str
    options: str


class Crypt(Struct, frozen=True):
    """A line of crypttab. `key`: where the key comes from, `none` or `-` for a passphrase."""

    name: str
    device: str
    key: str
    options: str


class System(Struct, frozen=True):
    """What a filesystem holds of an operating system. Empty where it has none of it.

    `id`, `version`, `name`: of os-release. `kernels`: their versions. `initramfs`: the tools that make it.
    `loaders`: boot loaders, `efi`: folders below EFI of an EFI system partition.
    """

    id: str = ""
    version: str = ""
    name: str = ""
    hostname: str = ""
    kernels: tuple[str, ...] = ()
    fstab: tuple[Mount, ...] = ()
    crypttab: tuple[Crypt, ...] = ()
    initramfs: tuple[str, ...] = ()
    loaders: tuple[str, ...] = ()
    efi: tuple[str, ...] = ()


def read_system(files: Files) -> System | None:
    """What is installed there; None where nothing of a system is."""
    release = _release(files)
    fstab = (Mount(*fields[:4]) for fields in _table(files, "etc/fstab", 4))
    crypttab = (Crypt(*fields[:4]) for fields in _table(files, "etc/crypttab", 4))
    system = System(
        id=release.get("ID", ""),
        version=release.get("VERSION_ID", ""),
        name=release.get("PRETTY_NAME", ""),
        hostname=_text(files.read("etc/hostname")).strip()[:_LONGEST],
        kernels=_kernels(files),
        fstab=tuple(fstab),
        crypttab=tuple(crypttab),
        initramfs=_there(files, _TOOLS),
        loaders=_there(files, _LOADERS),
        efi=tuple(map(_plain, files.names("EFI")))[:_MOST],
    )
    return system if system != System() else None


def parse_release(text: str) -> dict[str, str]:
    """The assignments of an os-release file; quotes as a shell takes them, nothing expanded."""
    import shlex

    out = {}
    for line in text.splitlines()[:_MOST]:
        key, mark, value = line.strip().partition("=")
        if not mark or not key.isidentifier():
            continue
        try:
            words = shlex.split(value)
        except ValueError:
            continue
        out[key] = (words[0] if words else "")[:_LONGEST]
    return out


def _release(files: Files) -> dict[str, str]:
    for path in ("usr/lib/os-release", "etc/os-release"):
        raw = files.read(path)
        if raw:
            return parse_release(_text(raw))
    return {}


def _table(files: Files, path: str, fields: int) -> Iterator[list[str]]:
    """The lines of a table of the system, without comments; missing fields are empty."""
    for line in _text(files.read(path)).splitlines():
        words = [word[:_LONGEST] for word in line.split("#", 1)[0].split()] if "#" not in line[:1] else []
        if len(words) >= 2:
            yield (words + [""] * fields)[:fields]


def _kernels(files: Files) -> tuple[str, ...]:
    found = set()
    for folder in ("boot", "."):
        for name in files.names(folder):
            for prefix in ("vmlinuz-", "kernel-", "bzImage-"):
                if name.startswith(prefix):
                    found.add(_plain(name.removeprefix(prefix)))
        if found:
            break
    return tuple(sorted(found))[:_MOST]


def _there(files: Files, wanted: tuple[tuple[str, str, str], ...]) -> tuple[str, ...]:
    out: dict[str, None] = {}
    listed: dict[str, frozenset[str]] = {}
    for name, folder, file in wanted:
        if folder not in listed:
            listed[folder] = frozenset(files.names(folder))
        if file in listed[folder]:
            out[name] = None
    return tuple(out)


def _plain(name: str) -> str:
    """A name that may hold bytes which are no text."""
    return name.encode(errors="surrogateescape").decode(errors="replace")[:_LONGEST]


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode(errors="replace").replace("\0", "")
