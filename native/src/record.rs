//! Records: a head of 64 bytes and a payload (repository-format.md, section 5).
//!
//! Invariant: a content leaves `open_block` only after its tag, its length and its
//! id have been checked.

use crate::bytes::Reader;
use crate::codec::{self, Codec};
use crate::crypto::{random_nonce, SessionKey, TAG};
use crate::digest::{b3d, b3k, xxh3, Id};
use crate::error::{damaged, invalid, Result};

/// Length of a record head.
pub const HEAD: usize = 64;
/// Envelope number of a record that is not encrypted.
pub const NO_KEY: u16 = 0xFFFF;
/// Largest block.
pub const MAX_BLOCK: usize = 4 << 20;
/// Most that a payload may exceed its plain length by.
pub const MAX_EXCESS: usize = 64 << 10;
const MAGIC: &[u8; 4] = b"IREC";

/// What a record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A block of an image.
    Block = 1,
    /// A page of a block map.
    Page = 2,
}

/// A record head, parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Block or page.
    pub kind: Kind,
    /// How the content is coded.
    pub codec: Codec,
    /// Envelope number within the pack, or `NO_KEY`.
    pub key: u16,
    /// Length of the content.
    pub plain: u32,
    /// Length of the payload.
    pub payload: u32,
    /// Id of the content.
    pub id: Id,
    /// Nonce of the encryption.
    pub nonce: [u8; 12],
}

impl Head {
    /// The head's 64 bytes.
    pub fn encode(&self) -> [u8; HEAD] {
        let mut out = [0; HEAD];
        out[..4].copy_from_slice(MAGIC);
        out[4] = self.kind as u8;
        out[5] = self.codec as u8;
        out[6..8].copy_from_slice(&self.key.to_le_bytes());
        out[8..12].copy_from_slice(&self.plain.to_le_bytes());
        out[12..16].copy_from_slice(&self.payload.to_le_bytes());
        out[16..48].copy_from_slice(&self.id);
        out[48..60].copy_from_slice(&self.nonce);
        let check = xxh3(&out[..60]) as u32;
        out[60..].copy_from_slice(&check.to_le_bytes());
        out
    }

    /// Parse a head; every field is checked against its bounds.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut r = Reader::new(bytes, "record head");
        if r.take(4)? != MAGIC {
            return damaged("no record where one should be");
        }
        let kind = match r.u8()? {
            1 => Kind::Block,
            2 => Kind::Page,
            other => return damaged(format!("unknown record kind {other}")),
        };
        let codec = Codec::from_u8(r.u8()?)?;
        let head =
            Self { kind, codec, key: r.u16()?, plain: r.u32()?, payload: r.u32()?, id: r.array()?, nonce: r.array()? };
        if r.u32()? != xxh3(&bytes[..60]) as u32 {
            return damaged("record head is damaged");
        }
        let (plain, payload) = (head.plain as usize, head.payload as usize);
        if plain > MAX_BLOCK || payload > plain + MAX_EXCESS {
            return damaged("record claims an impossible length");
        }
        Ok(head)
    }

    /// Length of the whole record.
    pub fn record_len(&self) -> u32 {
        HEAD as u32 + self.payload
    }

    fn aad(&self, repository: &[u8; 16], public: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(54 + public.len());
        out.extend_from_slice(repository);
        out.push(self.kind as u8);
        out.push(self.codec as u8);
        out.extend_from_slice(&self.plain.to_le_bytes());
        out.extend_from_slice(&self.id);
        out.extend_from_slice(public);
        out
    }
}

/// What is needed to make records of one repository.
pub struct Ids {
    /// The repository's id.
    pub repository: [u8; 16],
    /// Key of block ids.
    pub id_key: Id,
    /// Key of page ids.
    pub page_key: Id,
}

impl Ids {
    /// Derive the page key from the id key.
    pub fn new(repository: [u8; 16], id_key: Id) -> Self {
        Self { repository, id_key, page_key: b3d("imager 2026-11 map page v1", &id_key) }
    }

    /// Id of a block's content.
    pub fn block(&self, content: &[u8]) -> Id {
        b3k(&self.id_key, &[content])
    }

    /// Id of a page.
    pub fn page(&self, public: &[u8], sealed: &[u8]) -> Id {
        b3k(&self.page_key, &[&(public.len() as u32).to_le_bytes(), public, sealed])
    }
}

/// The key that new records are encrypted with, and its number in the pack's header.
pub type Sealer<'a> = Option<(&'a SessionKey, u16)>;

/// Records that are being put together, one after the other.
///
/// Memory once reached stays, so that it is neither fetched nor cleared again for the next ones.
#[derive(Default)]
pub struct Records {
    bytes: Vec<u8>,
    length: usize,
    heads: Vec<Head>,
}

impl Records {
    /// The finished records.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// Their heads, in order.
    pub fn heads(&self) -> &[Head] {
        &self.heads
    }

    /// Forget them.
    pub fn clear(&mut self) {
        self.length = 0;
        self.heads.clear();
    }

    fn room(&mut self, more: usize) -> &mut [u8] {
        let end = self.length + more;
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        &mut self.bytes[self.length..end]
    }

    /// Complete a record whose payload is `payload` bytes: encrypt its part from `secret` on, write the head.
    fn finish(
        &mut self, ids: &Ids, sealer: Sealer, mut head: Head, payload: usize, secret: usize, public: &[u8],
    ) -> Result<Head> {
        let mut end = payload;
        let bytes = &mut self.bytes[self.length..];
        if let Some((key, number)) = sealer {
            head.key = number;
            head.nonce = random_nonce()?;
            let aad = head.aad(&ids.repository, public);
            let tag = key.seal(&head.id, head.nonce, &aad, &mut bytes[HEAD + secret..HEAD + payload])?;
            bytes[HEAD + payload..HEAD + payload + TAG].copy_from_slice(&tag);
            end += TAG;
        }
        head.payload = match u32::try_from(end) {
            Ok(length) => length,
            Err(_) => return invalid("record too long"),
        };
        bytes[..HEAD].copy_from_slice(&head.encode());
        self.length += HEAD + end;
        self.heads.push(head);
        Ok(head)
    }

    /// Append the record of a block.
    pub fn block(
        &mut self, ids: &Ids, sealer: Sealer, codec: Codec, level: i32, id: &Id, content: &[u8],
    ) -> Result<Head> {
        let room = self.room(HEAD + codec::bound(content.len()) + TAG);
        let (codec, length) = codec::encode(codec, level, content, &mut room[HEAD..])?;
        let plain = content.len() as u32;
        let head = Head { kind: Kind::Block, codec, key: NO_KEY, plain, payload: 0, id: *id, nonce: [0; 12] };
        self.finish(ids, sealer, head, length, 0, b"")
    }

    /// Append the record of a map page.
    pub fn page(&mut self, ids: &Ids, sealer: Sealer, public: &[u8], sealed: &[u8]) -> Result<Head> {
        let secret = 4 + public.len();
        let length = secret + sealed.len();
        let room = &mut self.room(HEAD + length + TAG)[HEAD..];
        room[..4].copy_from_slice(&(public.len() as u32).to_le_bytes());
        room[4..secret].copy_from_slice(public);
        room[secret..length].copy_from_slice(sealed);
        let head = Head {
            kind: Kind::Page,
            codec: Codec::Stored,
            key: NO_KEY,
            plain: sealed.len() as u32,
            payload: 0,
            id: ids.page(public, sealed),
            nonce: [0; 12],
        };
        self.finish(ids, sealer, head, length, secret, public)
    }
}

/// The key a record needs, out of its pack's keys by envelope number.
fn key_of<'a>(head: &Head, keys: &'a [Option<SessionKey>]) -> Result<Option<&'a SessionKey>> {
    if head.key == NO_KEY {
        return if keys.is_empty() { Ok(None) } else { damaged("record is not encrypted, its pack is") };
    }
    match keys.get(usize::from(head.key)) {
        Some(Some(key)) => Ok(Some(key)),
        Some(None) => invalid("no key for this record"),
        None => damaged("record names an envelope that its pack does not have"),
    }
}

/// Split a record into head and payload.
pub fn split(record: &mut [u8]) -> Result<(Head, &mut [u8])> {
    let head = Head::decode(record)?;
    let payload = &mut record[HEAD..];
    if payload.len() != head.payload as usize {
        return damaged("record has another length than its place says");
    }
    Ok((head, payload))
}

/// Open a block's record into `out`, which must have its plain length.
/// The record's bytes are overwritten on the way.
pub fn open_block(ids: &Ids, keys: &[Option<SessionKey>], want: &Id, record: &mut [u8], out: &mut [u8]) -> Result<()> {
    let (head, payload) = split(record)?;
    if head.kind != Kind::Block || head.id != *want {
        return damaged("another record lies in its place");
    }
    if head.plain as usize != out.len() {
        return damaged("block has another length than the map says");
    }
    let plain: &[u8] = match key_of(&head, keys)? {
        Some(key) => {
            if payload.len() < TAG {
                return damaged("record is too short for its tag");
            }
            key.open(&head.id, head.nonce, &head.aad(&ids.repository, b""), payload)?
        }
        None => payload,
    };
    codec::decode(head.codec, plain, out)?;
    if ids.block(out) != *want {
        return damaged("content does not match its id");
    }
    Ok(())
}

/// Open a page's record: (id, public part, sealed part).
pub fn open_page<'a>(ids: &Ids, keys: &[Option<SessionKey>], record: &'a mut [u8]) -> Result<(Id, &'a [u8], &'a [u8])> {
    let (head, payload) = split(record)?;
    if head.kind != Kind::Page || head.codec != Codec::Stored {
        return damaged("another record lies in its place");
    }
    if payload.len() < 4 {
        return damaged("page is too short");
    }
    let (length, rest) = payload.split_at_mut(4);
    let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]) as usize;
    if length > rest.len() {
        return damaged("page is too short for its public part");
    }
    let (public, sealed) = rest.split_at_mut(length);
    let public: &[u8] = public;
    let plain: &[u8] = match key_of(&head, keys)? {
        Some(key) => key.open(&head.id, head.nonce, &head.aad(&ids.repository, public), sealed)?,
        None => sealed,
    };
    if plain.len() != head.plain as usize || ids.page(public, plain) != head.id {
        return damaged("page does not match its id");
    }
    Ok((head.id, public, plain))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::Cipher;
    use proptest::prelude::*;

    fn ids() -> Ids {
        Ids::new([7; 16], [9; 32])
    }

    fn session(cipher: Cipher) -> SessionKey {
        SessionKey { cipher, key: [5; 32] }
    }

    fn sealed(content: &[u8], key: Option<&SessionKey>) -> (Id, Vec<u8>) {
        let ids = ids();
        let id = ids.block(content);
        let mut out = Records::default();
        let sealer = key.map(|k| (k, 0));
        out.block(&ids, sealer, Codec::Lz4, 1, &id, content).expect("seals");
        (id, out.bytes().to_vec())
    }

    proptest! {
        #[test]
        fn blocks_come_back(content in proptest::collection::vec(any::<u8>(), 1..9000), chacha: bool, plain: bool) {
            let key = session(if chacha { Cipher::ChaCha } else { Cipher::Aes });
            let keys = if plain { vec![] } else { vec![Some(key.clone())] };
            let (id, mut record) = sealed(&content, (!plain).then_some(&key));
            let mut out = vec![0; content.len()];
            open_block(&ids(), &keys, &id, &mut record, &mut out).expect("opens");
            prop_assert_eq!(out, content);
        }

        #[test]
        fn one_flipped_bit_is_noticed(content in proptest::collection::vec(any::<u8>(), 1..3000), at: prop::sample::Index, bit in 0u8..8, plain: bool) {
            let key = session(Cipher::Aes);
            let keys = if plain { vec![] } else { vec![Some(key.clone())] };
            let (id, mut record) = sealed(&content, (!plain).then_some(&key));
            let position = at.index(record.len());
            record[position] ^= 1 << bit;
            let mut out = vec![0; content.len()];
            // A coder may have several spellings of one content; the id still holds.
            if open_block(&ids(), &keys, &id, &mut record, &mut out).is_ok() {
                prop_assert_eq!(out, content);
            }
        }

        #[test]
        fn garbage_never_panics(mut garbage in proptest::collection::vec(any::<u8>(), 0..400), fix: bool) {
            if fix && garbage.len() >= HEAD {
                garbage[..4].copy_from_slice(MAGIC);
                garbage[4] = 1 + garbage[4] % 2;
                garbage[5] %= 3;
                let check = xxh3(&garbage[..60]) as u32;
                garbage[60..64].copy_from_slice(&check.to_le_bytes());
            }
            let keys = [Some(session(Cipher::Aes))];
            let mut out = vec![0; 4096];
            prop_assert!(open_block(&ids(), &keys, &[1; 32], &mut garbage.clone(), &mut out).is_err());
            prop_assert!(open_page(&ids(), &keys, &mut garbage).is_err());
        }
    }
}
