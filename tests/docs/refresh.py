"""Write what the commands of a page really print into the page: `python -m tests.docs.refresh PAGE...`.

Only blocks without `...` are rewritten. Read the difference before you commit it.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.docs import pages, test_readme


def refreshed(page: str) -> str:
    """`page` with the real output under each command."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        stand_ins = {
            name: stack.enter_context(test_readme.loop_device(folder / f"stand-in-{i}", size))
            for i, (name, size) in enumerate(pages.devices(page))
        }
        (folder / "page").mkdir()
        for host, place in pages.servers(page):
            server = test_readme.ssh_server(folder, folder / "page", host, place)
            stand_ins |= stack.enter_context(server)
        results = test_readme.run_page(page, folder / "page", stand_ins)
    at = 0
    for step, _, printed in results:
        old = "\n".join([f"$ {step.command}", *step.expected]) + "\n"
        at = page.index(old, at)
        lines = step.expected if "..." in step.expected else printed
        new = "\n".join([f"$ {step.command}", *lines]) + "\n"
        page = page[:at] + new + page[at + len(old) :]
        at += len(new)
    return page


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path = Path(argument)
        path.write_text(refreshed(path.read_text()))
