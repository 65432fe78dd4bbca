"""Announcements, condemned packs, and the one outcome that a session has."""

from __future__ import annotations

import os
import threading

import pytest

from imager.errors import IntegrityError, Locked
from imager.repository import sessions
from imager.repository.format import SESSIONS, SETS, parse_session
from imager.repository.session import Session
from tests.unit.repository.building import Lab, noise


def test_an_announcement_names_what_was_condemned_before(lab: Lab) -> None:
    repository = lab.repository.config.repository
    (one,) = sessions.condemn(lab.storage, repository, [bytes([1]) * 32], [bytes([2]) * 32])
    sessions.announce(lab.storage, repository, "ab" * 16, host="h", kind="sync")
    sessions.condemn(lab.storage, repository, [bytes([3]) * 32], [])
    (found,) = sessions.open_sessions(lab.storage, repository)
    assert found.id == "ab" * 16 and found.seen == {one.id}
    assert found.told is not None and (found.told.kind, found.told.pid) == ("sync", os.getpid())
    assert not sessions.is_gone(found.told)
    packs = sessions.condemned_packs(lab.storage, repository)
    assert packs == {bytes([n]) * 32 for n in (1, 2, 3)}
    sessions.end(lab.storage, "ab" * 16)
    sessions.end(lab.storage, "ab" * 16)
    assert sessions.open_sessions(lab.storage, repository) == []


def test_a_damaged_announcement_still_holds_things_up(lab: Lab) -> None:
    """Nobody knows what it has seen, so it has seen nothing."""
    repository = lab.repository.config.repository
    sessions.announce(lab.storage, repository, "ab" * 16, host="h")
    path = lab.root / SESSIONS / ("ab" * 16)
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        (found,) = sessions.open_sessions(lab.storage, repository)
        assert found.told is None and found.seen == frozenset()
        with pytest.raises(IntegrityError):
            parse_session(path.read_bytes(), "ab" * 16, repository)


def test_the_first_sessions_had_no_digest(lab: Lab) -> None:
    repository = lab.repository.config.repository
    old = (
        b'{"created":1,"epoch":0,"generation":0,"host":"h","pid":7,"repository":"'
        + repository.encode()
        + b'","session":"'
        + b"ab" * 16
        + b'"}'
    )
    lab.storage.create(SESSIONS + "ab" * 16, old)
    (found,) = sessions.open_sessions(lab.storage, repository)
    assert found.told is not None and found.seen == frozenset() and not sessions.is_gone(found.told)


def test_of_commit_and_fence_exactly_one_wins(lab: Lab) -> None:
    committed = fenced = 0
    for turn in range(60):
        session = Session.begin(lab.repository)
        session.drain()
        results: dict[str, object] = {}
        barrier = threading.Barrier(2)

        def commit(session=session, results=results, barrier=barrier) -> None:  # type: ignore[no-untyped-def]
            barrier.wait()
            try:
                session.commit(b"a manifest, for all that this test cares")
                results["commit"] = True
            except Locked:
                results["commit"] = False

        def fence(session=session, results=results, barrier=barrier) -> None:  # type: ignore[no-untyped-def]
            barrier.wait()
            results["fence"] = sessions.fence(lab.storage, session.id, "a test")

        workers = [threading.Thread(target=one) for one in ((commit, fence) if turn % 2 else (fence, commit))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert results["commit"] != results["fence"]
        raw = lab.storage.read(SETS + session.id)
        assert raw.startswith(b"a manifest" if results["commit"] else b"IMGRABRT")
        committed += results["commit"] is True
        fenced += results["fence"] is True
        session.abandon()
    assert committed + fenced == 60


def test_a_backup_that_failed_holds_nothing_up(lab: Lab) -> None:
    with pytest.raises(RuntimeError):
        lab_backup_that_fails(lab)
    assert sessions.open_sessions(lab.storage, lab.repository.config.repository) == []
    lab.backup(sda=noise(3))


def lab_backup_that_fails(lab: Lab) -> None:
    with Session.begin(lab.repository) as session:
        session.seal(session.new_data_pack())
        raise RuntimeError
