"""Slots and envelopes open with the right key, with no other, and not when a bit is off."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imager.errors import ImagerError, IntegrityError, UsageError, WrongKey
from imager.repository import keys, writers
from imager.repository.format import canonical
from imager.repository.keys import Secret
from imager.repository.unlocking import Unlocking, in_order

REPOSITORY = bytes(range(16))
KEYFILE = Secret("keyfile", b"k" * 64)


def slot_of(secret: Secret, role: str = "full", **options: str) -> tuple[keys.Secrets, keys.Slot, bytes]:
    full = keys.new_secrets()
    seed, writer = writers.certify(REPOSITORY, full.signing_seed, host="h", label="l")
    secrets = {
        "full": full,
        "read": keys.for_reading(full),
        "write": keys.for_writing(full, seed, writer),
    }[role]
    name, raw = keys.new_slot(REPOSITORY, secrets, secret, **options)
    return secrets, keys.parse_slot(raw, name, REPOSITORY), raw


def test_a_keyfile_slot_opens_with_its_keyfile_alone() -> None:
    secrets, slot, _ = slot_of(KEYFILE)
    assert keys.open_slot(slot, KEYFILE) == secrets
    assert keys.open_slot(slot, Secret("keyfile", b"j" * 64)) is None
    assert keys.open_slot(slot, Secret("recovery", b"k" * 64)) is None
    assert keys.open_slot(slot, keys.passphrase("k")) is None


def test_a_slot_is_as_the_page_says() -> None:
    """Opened here by hand, with other libraries where there are any."""
    import blake3
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    secrets, slot, raw = slot_of(KEYFILE, label="a label")
    value = json.loads(raw)
    key = blake3.blake3(
        bytes.fromhex(value["kdf"]["salt"]) + KEYFILE.value,
        derive_key_context="imager 2026-11 keyfile slot v1",
    ).digest()
    data = b"imager slot v1" + REPOSITORY + bytes.fromhex(value["slot"]) + b"keyfile\0full"
    payload = AESGCM(key).decrypt(bytes.fromhex(value["nonce"]), bytes.fromhex(value["sealed"]), data)
    assert json.loads(payload) == {
        "id_key": secrets.id_key.hex(),
        "signing_seed": secrets.signing_seed.hex(),
        "epochs": {"1": secrets.epochs[1].hex()},
    }
    assert value["kdf"] == {"name": "blake3", "salt": slot.kdf.salt}


def test_a_passphrase_slot_takes_any_normal_form() -> None:
    secrets, slot, _ = slot_of(keys.passphrase("Köln"))
    assert (slot.kdf.name, slot.kdf.memory_kib, slot.kdf.passes, slot.kdf.lanes) == ("argon2id", 65536, 3, 4)
    assert keys.open_slot(slot, keys.passphrase("Ko\u0308ln")) == secrets
    assert keys.open_slot(slot, keys.passphrase("Koln")) is None


def test_a_write_only_slot_holds_no_private_epoch_key() -> None:
    writing, slot, _ = slot_of(KEYFILE, role="write")
    opened = keys.open_slot(slot, KEYFILE)
    assert opened == writing and (opened.epochs, opened.role, opened.newest) == ({}, "write", 1)
    assert opened.writer is not None and keys.public_key(opened.signing_seed).hex() == opened.writer.public
    secrets = keys.new_secrets()
    envelope = keys.seal_session_key(
        b"s" * 32,
        cipher=1,
        epoch=1,
        public=keys.epoch_public(secrets.epochs[1]),
        session=b"i" * 16,
        repository=REPOSITORY,
    )
    with pytest.raises(WrongKey, match="back up"):
        keys.open_envelope(envelope, opened, REPOSITORY)
    assert keys.open_envelope(envelope, secrets, REPOSITORY) == (1, b"s" * 32)


def test_a_slot_for_reading_signs_nothing() -> None:
    secrets, slot, raw = slot_of(KEYFILE, role="read")
    opened = keys.open_slot(slot, KEYFILE)
    assert opened == secrets and (opened.signing_seed, opened.role) == (b"", "read")
    assert json.loads(raw)["reads"] == [1] and list(opened.epochs) == [1]


@pytest.mark.parametrize("role", ["full", "read", "write"])
@pytest.mark.parametrize("other", ["full", "read", "write"])
def test_what_is_sealed_fits_the_role(role: str, other: str) -> None:
    """Whoever can seal a slot has its secret; a payload of another role is refused all the same."""
    from imager import _native

    secrets, slot, raw = slot_of(KEYFILE, role=role)
    value = json.loads(raw)
    key = _native.blake3_derive(
        "imager 2026-11 keyfile slot v1", bytes.fromhex(value["kdf"]["salt"]) + KEYFILE.value
    )
    start = b"imager slot v1" + REPOSITORY + bytes.fromhex(slot.slot) + b"keyfile\0"
    payload = _native.unwrap(
        key, bytes.fromhex(value["nonce"]), bytes.fromhex(value["sealed"]), start + role.encode()
    )
    assert payload is not None
    value["role"], value["nonce"] = other, "01" * 12
    value["sealed"] = _native.wrap(key, b"\1" * 12, payload, start + other.encode()).hex()
    if other == "write":
        value["writer"] = json.loads(slot_of(KEYFILE, role="write")[2])["writer"]
        value["writer"] = json.loads(raw).get("writer", value["writer"])
    else:
        value.pop("writer", None)
    changed = keys.parse_slot(canonical(value), slot.slot, REPOSITORY)
    if role == other:
        assert keys.open_slot(changed, KEYFILE) == secrets
        return
    with pytest.raises(IntegrityError):
        keys.open_slot(changed, KEYFILE)


def test_secrets_do_not_show_themselves() -> None:
    secrets = keys.new_secrets()
    for shown in (repr(secrets), str(secrets), repr(KEYFILE)):
        assert secrets.id_key.hex() not in shown and "kkkk" not in shown and repr(secrets.id_key) not in shown


@pytest.mark.parametrize("field", ["kind", "role", "label", "nonce", "sealed", "slot", "repository", "kdf"])
def test_a_changed_slot_never_opens(field: str) -> None:
    _, _, raw = slot_of(KEYFILE)
    value = json.loads(raw)
    other = json.loads(slot_of(KEYFILE, role="write")[2])
    other.update(kind="recovery", repository="ee" * 16)
    name = value["slot"]
    if field == "label":
        value["label"] = "another"  # nothing secret hangs on it
        assert keys.open_slot(keys.parse_slot(canonical(value), name, REPOSITORY), KEYFILE) is not None
        return
    value[field] = other[field]
    try:
        opened = keys.open_slot(keys.parse_slot(canonical(value), name, REPOSITORY), KEYFILE)
    except IntegrityError:
        return
    assert opened is None


@pytest.mark.parametrize(
    "kdf",
    [
        {"name": "argon2id", "salt": "00" * 16, "memory_kib": 1 << 21, "passes": 3, "lanes": 4},
        {"name": "argon2id", "salt": "00" * 16, "memory_kib": 65536, "passes": 17, "lanes": 4},
        {"name": "argon2id", "salt": "00" * 16, "memory_kib": 65536, "passes": 3, "lanes": 17},
        {"name": "argon2id", "salt": "00" * 16, "memory_kib": 0, "passes": 0, "lanes": 0},
        {"name": "argon2id", "salt": "00" * 16, "memory_kib": -1, "passes": 1, "lanes": -1},
        {"name": "argon2id", "salt": "00", "memory_kib": 65536, "passes": 3, "lanes": 4},
        {"name": "md5", "salt": "00" * 16},
    ],
)
def test_costs_out_of_bounds_are_refused_and_not_paid(kdf: dict[str, object]) -> None:
    value = json.loads(slot_of(KEYFILE)[2])
    value.update(kind="passphrase", kdf=kdf)
    slot = keys.parse_slot(canonical(value), value["slot"], REPOSITORY)
    with pytest.raises(IntegrityError):
        keys.open_slot(slot, keys.passphrase("x"))


def test_unlocking_tries_all_slots_beside_other_work() -> None:
    secrets = keys.new_secrets()
    slots = []
    for text in ("one", "two"):
        name, raw = keys.new_slot(REPOSITORY, secrets, keys.passphrase(text))
        slots.append(keys.parse_slot(raw, name, REPOSITORY))
    unlocking = Unlocking(slots, keys.passphrase("two"))
    assert unlocking._thread.is_alive()  # we are here before it is done
    assert unlocking.result() == secrets
    with pytest.raises(WrongKey):
        Unlocking(slots, keys.passphrase("three")).result()


def test_the_likely_slot_is_tried_first_and_costs_no_other() -> None:
    secrets = keys.new_secrets()
    slots = []
    for number in range(6):
        name, raw = keys.new_slot(REPOSITORY, secrets, keys.passphrase(f"word {number}"))
        slots.append(keys.parse_slot(raw, name, REPOSITORY))
    for number in (4, 0):
        unlocking = Unlocking(in_order(slots, slots[number].slot), keys.passphrase(f"word {number}"))
        assert unlocking.result() == secrets
        assert (unlocking.tried, unlocking.opened.slot) == (1, slots[number].slot)
    # One that costs more than the others comes last, whoever put it there.
    dear = json.loads(canonical(slots[0]))
    dear["kdf"] |= {"memory_kib": 1 << 20, "passes": 16}
    dear["slot"], dear["reads"] = "00" * 16, [1, 2, 3]
    slots.append(keys.parse_slot(canonical(dear), "00" * 16, REPOSITORY))
    # Nor does it help to claim the label of the likely one, and more epochs.
    for likely in ("", *(slot.slot for slot in slots[:6])):
        assert in_order(slots, likely)[-1].slot == "00" * 16


def test_a_damaged_slot_does_not_keep_the_others_shut() -> None:
    secrets, slot, raw = slot_of(KEYFILE)
    value = json.loads(raw)
    value["nonce"] = "00"
    bad = keys.parse_slot(canonical(value), slot.slot, REPOSITORY)
    assert Unlocking([bad, slot], KEYFILE).result() == secrets
    with pytest.raises(IntegrityError):
        Unlocking([bad], KEYFILE).result()


def test_what_no_secret_can_be() -> None:
    with pytest.raises(UsageError):
        keys.passphrase("")
    with pytest.raises(UsageError):
        keys.passphrase("\udc80")
    for wrong in (b"short", bytes((1 << 20) + 1)):
        with pytest.raises(UsageError):
            keys.keyfile(wrong)


def test_an_epoch_is_trusted_by_its_signature_alone() -> None:
    seed, private = os.urandom(32), os.urandom(32)
    raw = keys.new_epoch(REPOSITORY, 1, private, seed)
    verify = keys.public_key(seed)
    assert keys.parse_epoch(raw, "00000001", REPOSITORY, verify) == (1, keys.epoch_public(private))
    forged = keys.new_epoch(REPOSITORY, 1, os.urandom(32), os.urandom(32))
    for content, name, repository in (
        (forged, "00000001", REPOSITORY),
        (raw, "00000002", REPOSITORY),
        (raw, "00000001", b"x" * 16),
        (raw.replace(b'"epoch":1', b'"epoch":2'), "00000002", REPOSITORY),
    ):
        with pytest.raises(IntegrityError):
            keys.parse_epoch(content, name, repository, verify)


def test_every_bit_of_an_envelope_counts() -> None:
    secrets = keys.new_secrets()
    public = keys.epoch_public(secrets.epochs[1])
    envelope = keys.seal_session_key(
        b"s" * 32, cipher=2, epoch=1, public=public, session=b"i" * 16, repository=REPOSITORY
    )
    assert len(envelope) == 104
    assert keys.open_envelope(envelope, secrets, REPOSITORY) == (2, b"s" * 32)
    for at in range(104):
        for bit in (1, 0x80):
            changed = bytearray(envelope)
            changed[at] ^= bit
            with pytest.raises((IntegrityError, WrongKey)):
                keys.open_envelope(bytes(changed), secrets, REPOSITORY)
    with pytest.raises(IntegrityError):
        keys.open_envelope(envelope, secrets, b"x" * 16)


@settings(max_examples=60)
@given(st.binary(max_size=200))
def test_garbage_is_an_error_and_nothing_else(raw: bytes) -> None:
    secrets = keys.new_secrets()
    for parser in (
        lambda: keys.parse_slot(raw, "00" * 16, REPOSITORY),
        lambda: keys.parse_epoch(raw, "00000001", REPOSITORY, b"v" * 32),
        lambda: keys.open_envelope(raw, secrets, REPOSITORY),
    ):
        with pytest.raises(ImagerError):
            parser()
    assert keys.open_body(b"k" * 32, raw, b"") is None
