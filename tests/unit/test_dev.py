"""`./dev` installs exactly the Debian packages that are missing, also those the system never heard of."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]

DPKG_QUERY = """#!/bin/sh
for last; do :; done
case $last in
casync) printf 'rc ' ;;
restic) echo "dpkg-query: no packages found matching restic" >&2; exit 1 ;;
*) printf 'ii ' ;;
esac
"""
APT_GET = """#!/bin/sh
printf '%s\\n' "$*" >>"$APT_LOG"
case "$*" in *install*) exit 1 ;; esac
"""


def test_what_is_missing_is_installed(tmp_path: Path) -> None:
    for name, text in (("dpkg-query", DPKG_QUERY), ("apt-get", APT_GET), ("sudo", '#!/bin/sh\nexec "$@"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "APT_LOG": str(log), "HOME": str(tmp_path)}
    done = subprocess.run([ROOT / "dev", "test"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1  # the installation above fails on purpose: nothing is built or run
    assert "dev: installing casync restic\n" in done.stderr
    asked = [line.split()[-2:] for line in log.read_text().splitlines()]
    assert asked == [["-qq", "update"], ["casync", "restic"]]
