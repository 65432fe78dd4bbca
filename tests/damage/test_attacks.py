"""What the holder of a key that can write only may try, with the real code and by hand: refused, or noticed.

Each row of the table is one attack on a copy of one repository. The attacker has his key, can
write, overwrite and delete in the storage as he likes (append-only serving takes that away,
and is no part of this), and knows the format. Afterwards, for every row:

- what the row says is told: by `check` or `list`, by the next backup, or by opening;
- every set from before, if the attack left it there, restores bit for bit or is refused;
- what the attacker made does not pass for the newest set of anybody else;
- the owner's next backup is whole, and cannot be read with anything that the attacker has.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from imager import _native
from imager.cli.main import run
from imager.errors import ImagerError, IntegrityError, WrongKey
from imager.events import Silent
from imager.repository import imageset, index, keyring, keys, manifest, removal, sessions, writers
from imager.repository.credentials import Credentials
from imager.repository.format import KIND_DATA, canonical, config_message, lineage_id, now, pack_object
from imager.repository.imageset import Manifest, Previous
from imager.repository.keys import Secret
from imager.repository.packs import read_header
from imager.repository.repository import Repository
from imager.repository.session import Session
from imager.storage.folder import FolderStorage
from tests.damage.conftest import Copy
from tests.damage.workshop import Place, World, restored, write

MINE = Secret("keyfile", b"m" * 40)
"The attacker's key: of this machine."
THEIRS = Secret("keyfile", b"t" * 40)
"A writer's of another machine, which the attacker does not have."
HOST = os.uname().nodename


class Given(Credentials, frozen=True, kw_only=True):
    """Opens with one secret, whatever the environment offers."""

    secret: Secret

    def obtain(self, kinds: Any) -> Secret:
        return self.secret


@dataclass
class Scene:
    """A copy of the repository with two writers; `own`: the set that the attacker's key made honestly."""

    place: Place
    world: World
    own: str

    def open(self, secret: Secret) -> Repository:
        return Repository.open(FolderStorage(str(self.place.root)), Given(secret=secret), writing=True)

    @property
    def owner(self) -> Secret:
        return keys.keyfile((self.place.folder / "key").read_bytes())

    def path(self, name: str) -> Path:
        path = self.place.root / name
        path.parent.mkdir(exist_ok=True)
        return path

    def set(self, name: str) -> Path:
        return self.place.root / "sets" / self.world.sets[name]

    def forge(
        self,
        *,
        name: str = "own",
        host: str = HOST,
        lineage: tuple[str, str] | None = None,
        certificate: dict[str, str] | None = None,
        signer: bytes | None = None,
        **public: Any,
    ) -> str:
        """A set that the attacker makes by hand, of a root that there is; its id. `public`: what differs."""
        with self.open(MINE) as repository:
            secrets = repository.secrets
            assert secrets.writer is not None
            last = imageset.read_set(repository, self.own)
            with Session.begin(repository) as session:
                id_key = secrets.id_key
                fields = {
                    "repository": repository.config.repository,
                    "set": session.id,
                    "version": 1,
                    "features": (),
                    "created": now(),
                    "lineage": lineage_id(id_key, *(lineage or (host, name))).hex(),
                    "sequence": last.sequence + 1,
                    "previous": Previous(last.id, last.digest.hex()),
                    "envelope": session.envelope.hex() if session.envelope else None,
                    "roots": last.public.roots,
                }
                written = msgspec.structs.replace(secrets, signing_seed=signer or secrets.signing_seed)
                if certificate is not None:
                    written = msgspec.structs.replace(
                        written,
                        writer=type(secrets.writer)(**{**_fields(secrets.writer), **certificate}),
                    )
                repository.secrets = written
                body = imageset.Body(name, host, (imageset.Image("gamma.img", 29 * 4096, 4096),))
                raw = manifest.encode(repository, imageset.Public(**{**fields, **public}), body, session.key)
                session.commit(raw)
            return session.id


def _fields(struct: Any) -> dict[str, str]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


@pytest.fixture
def scene(worlds: dict[str, World], copy: Copy, monkeypatch: pytest.MonkeyPatch) -> Scene:
    world = worlds["sealed"]
    place = copy(world)
    owner = keys.keyfile((place.folder / "key").read_bytes())
    with Repository.open(FolderStorage(str(place.root)), Given(secret=owner), writing=True) as repository:
        keyring.add(repository, MINE, role="write", host=HOST, label="mine")
        keyring.add(repository, THEIRS, role="write", host="elsewhere", label="theirs")
    (place.folder / "mine").write_bytes(MINE.value)
    gamma = world.contents[world.sets["other"], "gamma.img"]
    (place.folder / "gamma.img").write_bytes(gamma)
    monkeypatch.setenv("IMAGER_KEYFILE", str(place.folder / "mine"))
    ended = place.imager("backup", place.folder / "gamma.img", "--name", "own")
    assert ended.code == 0, ended
    monkeypatch.setenv("IMAGER_KEYFILE", str(place.folder / "key"))
    assert place.imager("check", "--read-data").code == 0
    return Scene(place, world, ended.summary["set"])


# --- what can be told ----------------------------------------------------------------------------


Attack = Callable[[Scene], str | None]
"Carries it out. Returns the id of the set that it made, if it made one."


@dataclass(frozen=True, slots=True)
class Row:
    """An attack. `told`: what check (its problems and notes) or list (its warnings) says of it.

    `check`: the exit code of check. `damage`: it destroys something, as whoever may write can.
    `refused`: what he made is no set; else it is one of his own machine, with numbers that are told.
    """

    attack: str
    do: Attack
    told: str
    check: int = 30
    damage: bool = False
    refused: bool = True

    def __str__(self) -> str:
        return self.attack.replace(" ", "-")


def forged(**options: Any) -> Attack:
    return lambda scene: scene.forge(**options)


def an_epoch_of_his_own(scene: Scene) -> None:
    with scene.open(MINE) as repository:
        raw = keys.new_epoch(repository.id, 2, os.urandom(32), repository.secrets.signing_seed)
        repository.storage.create("epochs/00000002", raw)


def an_older_epoch_again(scene: Scene) -> None:
    shutil.copy(scene.path("epochs/00000001"), scene.path("epochs/00000002"))


def epoch_replaced(scene: Scene) -> None:
    with scene.open(MINE) as repository:
        raw = keys.new_epoch(repository.id, 1, os.urandom(32), repository.secrets.signing_seed)
    write(scene.path("epochs/00000001"), raw)


def replayed_as_a_new_set(scene: Scene) -> None:
    shutil.copy(scene.set("first"), scene.path("sets/" + "ab" * 16))


def replayed_over_the_newest(scene: Scene) -> None:
    write(scene.set("third"), scene.set("first").read_bytes())


def newest_deleted(scene: Scene) -> None:
    scene.set("third").unlink()


def rolled_back(scene: Scene) -> None:
    """Everything as it was before the newest set of the machine."""
    scene.set("third").unlink()
    for kind, names in (("packs", scene.world.packs["third"]), ("maps", scene.world.maps["third"])):
        for name in names:
            (scene.place.root / kind / name.hex()[:2] / name.hex()).unlink()


def renamed(scene: Scene) -> None:
    """A set of somebody else, given to another lineage, and signed with the key that the attacker has."""
    path = scene.set("other")
    raw = path.read_bytes()
    length = int.from_bytes(raw[8:12], "little")
    public = json.loads(raw[16 : 16 + length])
    with scene.open(MINE) as repository:
        public["lineage"] = lineage_id(repository.secrets.id_key, HOST, "machine").hex()
        public["writer"] = json.loads(canonical(repository.secrets.writer))
        head = canonical(public)
        signed = raw[:8] + len(head).to_bytes(4, "little") + raw[12:16] + head + raw[16 + length : -64]
        message = _native.blake3(b"imager set v1" + signed)
        write(path, signed + keys.sign(repository.secrets.signing_seed, message))


def certified_by_himself(scene: Scene) -> str:
    with scene.open(MINE) as repository:
        _, certificate = writers.certify(
            repository.id, repository.secrets.signing_seed, host="*", label="root"
        )
        seed = repository.secrets.signing_seed
    mine = {**_fields(certificate), "public": keys.public_key(seed).hex()}
    return scene.forge(certificate=mine)


def with_the_certificate_of_another(scene: Scene) -> str:
    with scene.open(THEIRS) as repository:  # its slot is public, but for what is sealed
        theirs = _fields(repository.secrets.writer)
    return scene.forge(host="elsewhere", certificate=theirs)


def not_signed_at_all(scene: Scene) -> str:
    made = scene.forge()
    path = scene.path(f"sets/{made}")
    raw = path.read_bytes()
    write(path, raw[:-64] + bytes(64))
    return made


def a_revocation_of_another(scene: Scene) -> None:
    with scene.open(THEIRS) as repository:
        assert repository.secrets.writer is not None
        writer = repository.secrets.writer.writer
    with scene.open(MINE) as repository:
        raw = writers.new_revocation(repository.id, repository.secrets.signing_seed, writer, [])
        scene.path(f"revoked/{writer}").write_bytes(raw)


def a_role_raised(scene: Scene) -> None:
    with scene.open(MINE) as repository:
        assert repository.slot is not None
        path = scene.path(f"slots/{repository.slot.slot}")
    value = json.loads(path.read_bytes())
    for bare in (value, {key: one for key, one in value.items() if key != "writer"}):
        write(path, canonical({**bare, "role": "full"}))
        with pytest.raises(ImagerError):
            scene.open(MINE)
    write(path, canonical({**value, "role": "full"}))


def a_slot_for_another_machine(scene: Scene) -> None:
    """The certificate in the open part of his slot says another host, or is of another writer."""
    with scene.open(MINE) as repository:
        assert repository.slot is not None
        path = scene.path(f"slots/{repository.slot.slot}")
    value = json.loads(path.read_bytes())
    with scene.open(THEIRS) as repository:
        theirs = json.loads(canonical(repository.secrets.writer))
    write(path, canonical({**value, "writer": theirs}))
    with pytest.raises(IntegrityError, match="another writer"):
        scene.open(MINE)
    write(path, canonical({**value, "writer": {**value["writer"], "host": "*"}}))
    with pytest.raises(IntegrityError, match="another writer"):
        scene.open(MINE)


def a_slot_that_is_no_object(scene: Scene) -> None:
    scene.path("slots/" + "00" * 16).write_bytes(b"{}")


def a_block_for_others(scene: Scene) -> None:
    """A record with the id of content that others are going to have, and with another content."""
    with scene.open(MINE) as repository:
        wanted = repository.vault.block_id(b"soon on every machine".ljust(4096, b"."))
        with Session.begin(repository) as session:
            pack = session.new_data_pack()
            known = _native.Known(repository.names)
            _native.scan(
                repository.vault,
                b"poison".ljust(4096, b"!"),
                [(0, 1)],
                image_size=4096,
                block_size=4096,
                base=_native.Slots(1, _native.UNKNOWN),
                pack=pack,
                known=known,
            )
            name = session.seal(pack)
            assert name is not None
            session.drain()
            fd = repository.storage.open(pack_object(KIND_DATA, name))
            ((kind, _, offset, length),) = _native.pack_records(fd, name, repository.id)
            os.close(fd)
            lie = _native.Known(repository.names)
            lie.add_pack(repository.names.intern(name), [(kind, wanted, offset, length)])
            index.write_segment(session, lie)
            session.drain()


def packs_overwritten(scene: Scene) -> None:
    for name in scene.world.packs["third"]:
        path = scene.place.root / "packs" / name.hex()[:2] / name.hex()
        write(path, bytes(path.stat().st_size))


DAY = 24 * 3600 * 1_000_000

TABLE = [
    Row("an epoch of his own", an_epoch_of_his_own, "key epoch 00000002 is not signed"),
    Row("an older epoch again", an_older_epoch_again, "key epoch 00000002 is damaged"),
    Row("an old set as a new one", replayed_as_a_new_set, "it is a copy of image set"),
    Row("an old set in the place of the newest", replayed_over_the_newest, "it is a copy of", damage=True),
    Row("the newest set deleted", newest_deleted, "is gone: it was deleted", damage=True),
    Row("an older state of everything", rolled_back, "is gone: it was deleted", damage=True),
    Row("a set given to another lineage", renamed, "its body does not open", damage=True),
    Row("a set of another machine", forged(host="elsewhere"), "may sign sets of"),
    Row("a set in the lineage of another machine", forged(lineage=("elsewhere", "db")), "its lineage is not"),
    Row("a set in another lineage than its name's", forged(lineage=(HOST, "machine")), "its lineage is not"),
    Row("a certificate by himself", certified_by_himself, "never certified"),
    Row("a certificate changed", forged(certificate={"host": "*"}), "never certified"),
    Row("the certificate of another", with_the_certificate_of_another, "not by this repository"),
    Row("a signature by any key", forged(signer=b"x" * 32), "not by this repository"),
    Row("no signature", not_signed_at_all, "not by this repository"),
    Row("a time to come", forged(created=now() + 400 * DAY), "taken in the future", check=0, refused=False),
    Row("a time gone by", forged(created=now() - 400 * DAY), "its time is not later", refused=False),
    Row("a number far ahead", forged(sequence=1000), "it does not follow on", refused=False),
    Row(
        "a set before it that never was",
        forged(previous=Previous("ef" * 16, "00" * 32)),
        "is missing",
        refused=False,
    ),
    Row("a revocation of another writer", a_revocation_of_another, "not signed by this repository's key"),
    Row("a slot's role raised", a_role_raised, "key slot"),
    Row("a slot that is no object", a_slot_that_is_no_object, "key slot 0000"),
    Row("a slot for another machine", a_slot_for_another_machine, "certificate that this repository never"),
    Row("packs overwritten", packs_overwritten, "not a pack", damage=True),
]


def told(place: Place) -> tuple[int, str]:
    """The exit code of check, and all that check and list say."""
    checked = place.imager("check", "--read-data")
    summary = checked.summary
    lines = [f"{one['object']}: {one['detail']}" for one in summary["problems"]] + summary["notes"]
    return checked.code, "\n".join([*lines, place.imager("list").err])


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_attack(row: Row, scene: Scene, quick: Path) -> None:
    place = scene.place
    newest_before = place.imager("show", "own").out
    made = row.do(scene)
    code, said = told(place)
    assert code == row.check and row.told in said, said
    out = place.folder / "out"
    for disk, content in scene.world.contents.items():
        ended, got = restored(place, disk, out)
        assert (ended.code, got) == (0, content) or (row.damage and ended.code in (1, 30)), ended
    if made is not None and row.refused:
        # What is refused is no set, and does not pass for the newest one.
        assert place.imager("restore", f"{made}:gamma.img", out).code == 30
        assert place.imager("show", "own").out in ("", newest_before)
    # The owner goes on, and the attacker cannot read it.
    source = place.folder / "alpha.img"
    source.write_bytes(scene.world.contents[scene.world.sets["second"], "alpha.img"] + b"secret" * 900)
    ended = place.imager("backup", source, "--name", "after")
    assert ended.code == 0, ended
    set_id = ended.summary["set"]
    assert place.imager("verify", set_id).code == 0
    with scene.open(scene.owner) as repository:
        fresh = imageset.read_set(repository, set_id)
    nothing_opens(scene, fresh)


def nothing_opens(scene: Scene, fresh: Manifest) -> None:
    """None of what the attacker holds opens a set's envelope, used in any way that it could be."""
    try:
        repository = scene.open(MINE)
    except ImagerError:
        return  # He has spoiled his own slot.
    with repository:
        secrets = repository.secrets
        held = [secrets.id_key, secrets.signing_seed, MINE.value[:32], secrets.verify_key]
        assert secrets.epochs == {} and fresh.envelope is not None
        with pytest.raises(WrongKey):
            repository.open_envelope(fresh.envelope)
        for number in (1, 2):
            for key in held:
                guess = msgspec.structs.replace(secrets, epochs={number: key})
                with pytest.raises((IntegrityError, WrongKey)):
                    keys.open_envelope(fresh.envelope, guess, repository.id)
        assert imageset.read_set(repository, fresh.id).body is None


# --- reading -----------------------------------------------------------------------------------------


def test_he_reads_no_block_of_others_nor_his_own(scene: Scene) -> None:
    with scene.open(MINE) as repository:
        for name in repository.pack_names(KIND_DATA):
            number = repository.names.intern(name)
            assert not any(repository.pack_reader(number)[1])
            with pytest.raises(WrongKey, match="does not open"), repository.packs([number]):
                pass
            fd = repository.storage.open(pack_object(KIND_DATA, name))
            envelopes = _native.pack_envelopes(read_header(fd), repository.id)
            os.close(fd)
            for envelope in envelopes:
                with pytest.raises(WrongKey):
                    repository.session_key(envelope)
        for one in imageset.list_sets(repository).sets:
            with pytest.raises(WrongKey):
                _ = one.content
    os.environ["IMAGER_KEYFILE"] = str(scene.place.folder / "mine")
    for verb in (["show", "latest"], ["verify", scene.own], ["restore", scene.own, scene.place.folder / "o"]):
        assert scene.place.imager(*verb).code == 12
    assert not (scene.place.folder / "o").exists()


def test_his_slot_holds_no_key_of_the_repository(scene: Scene) -> None:
    """Opened by hand: neither the repository's signing seed nor a private key of an epoch is in it."""
    with scene.open(scene.owner) as repository:
        full = repository.secrets
    with scene.open(MINE) as repository:
        slot = repository.slot
        assert slot is not None
        data = b"imager slot v1" + repository.id + bytes.fromhex(slot.slot) + b"keyfile\0write"
        key = _native.blake3_derive(
            "imager 2026-11 keyfile slot v1", bytes.fromhex(slot.kdf.salt) + MINE.value
        )
        payload = _native.unwrap(key, bytes.fromhex(slot.nonce), bytes.fromhex(slot.sealed), data)
    assert payload is not None and full.id_key.hex() in payload.decode()
    for secret in (full.signing_seed, *full.epochs.values()):
        assert secret.hex() not in payload.decode()


# --- taking over -----------------------------------------------------------------------------------------


def test_a_config_of_his_own_is_refused(scene: Scene) -> None:
    """He makes himself the repository's key: whoever opens it with another slot notices."""
    path = scene.path("config")
    value = json.loads(path.read_bytes())
    with scene.open(MINE) as repository:
        seed = repository.secrets.signing_seed
    value["verify_key"] = keys.public_key(seed).hex()
    value["seal"] = keys.sign(seed, config_message(value)).hex()
    write(path, canonical(value))
    for verb in (["list"], ["check"], ["backup", scene.place.folder / "gamma.img", "--name", "x"]):
        ended = scene.place.imager(*verb)
        assert ended.code == 30 and "config" in ended.err
    for secret in (MINE, THEIRS):
        with pytest.raises(IntegrityError, match="config"):
            scene.open(secret)


def test_a_config_without_encryption_is_refused(scene: Scene) -> None:
    """Nobody who has used the repository stores anything in the open because somebody else says so."""
    path = scene.path("config")
    raw = path.read_bytes()
    value = json.loads(raw)
    bare = {key: one for key, one in value.items() if key not in ("seal", "verify_key")}
    bare |= {"encryption": "none", "id_key": "ab" * 32}
    for repository in (value["repository"], "cd" * 16):
        bare["repository"] = repository
        write(path, canonical({**bare, "seal": config_message(bare).hex()}))
        before = [scene.place.files(kind) for kind in ("packs", "sessions", "sets")]
        source = scene.place.folder / "gamma.img"
        for verb in (["backup", source, "--name", "x"], ["list"], ["check"]):
            ended = scene.place.imager(*verb)
            assert ended.code == 30 and "was encrypted" in ended.err and '"hint":"put config' in ended.err
        assert before == [scene.place.files(kind) for kind in ("packs", "sessions", "sets")]
    write(path, raw)
    assert scene.place.imager("check").code == 0


def test_a_slot_of_his_own_gives_him_nothing(scene: Scene) -> None:
    """With secrets that he made up, in every role; and one that would give the owner another repository."""
    with scene.open(MINE) as repository:
        mine = repository.secrets
        made_up = msgspec.structs.replace(keys.new_secrets(), id_key=mine.id_key)
        own = msgspec.structs.replace(made_up, signing_seed=mine.signing_seed)
        _, certificate = writers.certify(
            repository.id, b"z" * 32, host="*", label="l", seed=mine.signing_seed
        )
        wider = msgspec.structs.replace(mine, writer=certificate)
        for secrets in (made_up, own, keys.for_reading(made_up), wider):
            secret = Secret("keyfile", os.urandom(40))
            name, raw = keys.new_slot(repository.id, secrets, secret)
            scene.path(f"slots/{name}").write_bytes(raw)
            with pytest.raises(IntegrityError):
                scene.open(secret)
    assert scene.place.imager("list").code == 0


def test_an_epoch_that_is_replaced_stops_backups_before_they_write(scene: Scene) -> None:
    epoch_replaced(scene)
    before = scene.place.files("packs")
    code, said = told(scene.place)
    assert code == 30 and "key epoch 00000001 is not signed" in said
    ended = scene.place.imager("backup", scene.place.folder / "gamma.img", "--name", "x")
    assert ended.code == 30 and "nothing was encrypted to it" in ended.err
    assert scene.place.files("packs") == before
    # What is stored is read without it.
    assert scene.place.imager("verify", "latest").code == 0


def test_a_poisoned_block_is_never_given_out(scene: Scene) -> None:
    """Deduplication among writers has this limit: what he stored in advance, under an id that is not that of
    the content, others do not store. `verify` tells, and it is never restored as something else."""
    a_block_for_others(scene)
    source = scene.place.folder / "victim.img"
    source.write_bytes(b"soon on every machine".ljust(4096, b".") + bytes(range(256)) * 16)
    ended = scene.place.imager("backup", source, "--name", "victim")
    assert ended.code == 0
    assert scene.place.imager("verify", "victim").code == 30
    out = scene.place.folder / "out"
    assert scene.place.imager("restore", "victim", out).code == 30
    assert not out.exists() or b"poison" not in out.read_bytes()


def test_no_key_of_his_changes_keys(scene: Scene) -> None:
    before = scene.place.files("slots")
    with scene.open(MINE) as repository:
        attempts: list[Callable[[], object]] = [
            lambda: keyring.add(repository, Secret("keyfile", b"n" * 40)),
            lambda: removal.remove(repository, "theirs"),
            lambda: keyring.rotate(repository, MINE),
        ]
        for attempt in attempts:
            with pytest.raises(WrongKey, match="role write"):
                attempt()
    assert scene.place.files("slots") == before


def test_the_next_backup_of_his_machine_is_not_built_on_another_ones_set(scene: Scene) -> None:
    """A writer of another machine puts a set into this machine's lineage: it is told, and passed over."""
    with scene.open(THEIRS) as repository:
        assert repository.secrets.writer is not None
        id_key = repository.secrets.id_key
        last = imageset.read_set(repository, scene.own)
        with Session.begin(repository) as session:
            public = imageset.Public(
                repository=repository.config.repository,
                set=session.id,
                version=1,
                features=(),
                created=now(),
                lineage=lineage_id(id_key, HOST, "own").hex(),
                sequence=last.sequence + 1,
                previous=Previous(last.id, last.digest.hex()),
                envelope=session.envelope.hex() if session.envelope else None,
                roots=(None,),
            )
            body = imageset.Body("own", HOST, (imageset.Image("gamma.img", 0, 4096),))
            session.commit(manifest.encode(repository, public, body, session.key))
    reporter = Silent()
    with scene.open(MINE) as repository:
        from imager.engine import backup
        from imager.engine.backup_plan import BackupOptions

        plan = backup.plan(
            repository, [str(scene.place.folder / "gamma.img")], BackupOptions(name="own"), reporter
        )
        assert plan.previous is not None and plan.previous.id == scene.own
    assert any("theirs, which is not this host's" in text for text in reporter.warnings)
    code, said = told(scene.place)
    assert code == 30 and "may sign sets of elsewhere" in said


def test_what_anybody_put_there_hides_no_rollback(scene: Scene) -> None:
    """A forged manifest, newer than all in the lineage, does not become what this machine remembers."""
    raw = scene.set("third").read_bytes()
    length = int.from_bytes(raw[8:12], "little")
    public = {**json.loads(raw[16 : 16 + length]), "set": "ab" * 16, "sequence": 1000, "created": now()}
    head = canonical(public)
    forged = raw[:8] + len(head).to_bytes(4, "little") + raw[12:16] + head + raw[16 + length :]
    path = scene.path("sets/" + "ab" * 16)
    path.write_bytes(forged)
    source = scene.place.folder / "gamma.img"
    assert scene.place.imager("backup", source, "--name", "seen").code == 0
    path.unlink()
    newest_deleted(scene)
    ended = scene.place.imager("backup", source, "--name", "seen")
    assert ended.code == 0 and f"{scene.world.sets['third']} (number" in ended.out, ended.out


def test_names_of_his_choice_do_not_look_like_what_the_program_says(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither steer they the terminal, nor are they lines of their own."""
    lie = "\x1b[2K\rok\nthe repository is whole\x9b1A\u202e"
    scene.forge(name=lie, sequence=1, previous=None)
    with scene.open(MINE) as repository:
        sessions.announce(repository.storage, repository.config.repository, "ab" * 16, host=lie)
    root = ["-r", str(scene.place.root)]
    for verb in (["list"], ["check"], ["prune", "--dry-run"], ["show", "latest"]):
        code = run([*root, *verb])
        ended = capsys.readouterr()
        said = ended.out + ended.err
        assert "?" in said and not any(c in said for c in "\x1b\r\x9b\u202e"), said
        assert not any(line.startswith(("ok", "the repository is whole")) for line in said.splitlines()[:-1])
        assert code == 0


def test_numbers_that_do_not_fit_are_refused_by_hand_too(scene: Scene) -> None:
    with pytest.raises(ValueError, match="sequence"):
        scene.forge(previous=None, sequence=2)
    with scene.open(MINE) as repository:
        raw = scene.path(f"sets/{scene.own}").read_bytes()
        length = int.from_bytes(raw[8:12], "little")
        public = {**json.loads(raw[16 : 16 + length]), "sequence": 7}
        head = canonical(public)
        signed = raw[:8] + len(head).to_bytes(4, "little") + raw[12:16] + head + raw[16 + length : -64]
        seal = keys.sign(repository.secrets.signing_seed, _native.blake3(b"imager set v1" + signed))
        with pytest.raises(ImagerError):
            manifest.decode(repository, scene.own, signed + seal)
