"""`imager key`: the group of verbs for the keys of a repository."""

from __future__ import annotations

from imager.cli.group import LazyGroup

_VERBS = ("add", "list", "remove", "passwd", "export", "rotate")

command = LazyGroup(
    name="key",
    modules={verb: f"imager.cli.verbs.key_{verb}" for verb in _VERBS},
    top=False,
    short_help="Who can open the repository, and with what.",
    help="""Who can open the repository, and with what.

    \b
    A key slot lets one secret (passphrase, keyfile, recovery key) open the
    repository in one role:
      full   everything, keys too
      read   restore, verify, check
      write  back up one machine, and read nothing back
    SLOT is a slot's label, its id, or a unique prefix of that.
    """,
    context_settings={"help_option_names": ["-h", "--help"]},
)
