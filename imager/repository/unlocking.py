"""Trying key slots with a secret, beside other work.

Invariant: a secret opens a slot or it does not; which part of a key was wrong is
never told. The slow step (Argon2id, about 64 MiB and some tenths of a second each) is paid
for the slot that is most likely the one before it is paid for another.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from imager.errors import ImagerError, WrongKey
from imager.repository.format import Slot
from imager.repository.keys import Secret, Secrets, open_slot


def in_order(slots: Sequence[Slot], likely: str) -> list[Slot]:
    """Slots in the order to try them: the likely one, then by what trying costs, then the newer epochs.

    So a slot that somebody put there with the highest costs delays only those whose key opens nothing else.
    """

    def cost(slot: Slot) -> int:
        return slot.kdf.memory_kib * slot.kdf.passes

    remembered = next((slot for slot in slots if slot.slot == likely), None)
    if remembered is not None:
        # A rotation that was killed leaves the old slot beside its new one, which reads more. Label, role and
        # epochs are in the open: what claims to be that one, and costs more, is not tried before others.
        alike = [
            slot
            for slot in slots
            if (slot.label, slot.role) == (remembered.label, remembered.role)
            and cost(slot) <= cost(remembered)
        ]
        likely = max(alike, key=lambda slot: (max(slot.reads, default=0), slot.slot == likely)).slot

    def order(slot: Slot) -> tuple[bool, int, int, str]:
        return slot.slot != likely, cost(slot), -max(slot.reads, default=0), slot.slot

    return sorted(slots, key=order)


class Unlocking:
    """Slots being tried in the background, from the moment this is made.

    The slow step lets other Python code run, so a caller makes this
    first, does its other preparations, and asks for `result` when it must.
    """

    def __init__(self, slots: Sequence[Slot], secret: Secret) -> None:
        self._slots = slots
        self._secret = secret
        self._secrets: Secrets | None = None
        self._opened: Slot | None = None
        self._error: ImagerError | None = None
        self.tried = 0
        "Slots tried so far."
        self._thread = threading.Thread(target=self._work, name="unlock", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        for slot in self._slots:
            self.tried += 1
            try:
                self._secrets = open_slot(slot, self._secret)
            except ImagerError as error:
                self._error = error  # Another slot may still open.
            except MemoryError:
                self._error = ImagerError(
                    f"not enough memory to try the {self._secret.kind}",
                    hint="a passphrase needs 64 MiB for a moment",
                )
            except Exception as error:  # Told by `result`, not by a thread that nobody listens to.
                self._error = ImagerError(f"the {self._secret.kind} could not be tried: {error}")
            if self._secrets is not None:
                self._opened = slot
                return

    def result(self) -> Secrets:
        """The secrets. Raises `WrongKey`; `IntegrityError` where no slot opened and one was damaged."""
        self._thread.join()
        if self._secrets is not None:
            return self._secrets
        if self._error is not None:
            raise self._error
        kind = "recovery key" if self._secret.kind == "recovery" else self._secret.kind
        raise WrongKey(
            f"no key slot opens with this {kind}",
            hint="check for another keyboard layout, or for another repository's secret",
        )

    @property
    def opened(self) -> Slot:
        """The slot that opened, once `result` has returned."""
        assert self._opened is not None
        return self._opened
