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

fn finish(out: &mut [u8], at: usize, mut head: Head) -> Result<Head> {
    head.payload = match u32::try_from(out.len() - at - HEAD) {
        Ok(length) => length,
        Err(_) => return invalid("record too long"),
    };
    out[at..at + HEAD].copy_from_slice(&head.encode());
    Ok(head)
}

/// Append the record of a block to `out`. `scratch` is reused between calls.
pub fn seal_block(
    ids: &Ids, sealer: Sealer, codec: Codec, level: i32, id: &Id, content: &[u8], scratch: &mut Vec<u8>,
    out: &mut Vec<u8>,
) -> Result<Head> {
    let used = codec::encode(codec, level, content, scratch)?;
    let at = out.len();
    let mut head = Head {
        kind: Kind::Block,
        codec: used,
        key: NO_KEY,
        plain: content.len() as u32,
        payload: 0,
        id: *id,
        nonce: [0; 12],
    };
    out.extend_from_slice(&[0; HEAD]);
    out.extend_from_slice(scratch);
    if let Some((key, number)) = sealer {
        head.key = number;
        head.nonce = random_nonce()?;
        key.seal(id, head.nonce, &head.aad(&ids.repository, b""), out, at + HEAD)?;
    }
    finish(out, at, head)
}

/// Append the record of a map page to `out`.
pub fn seal_page(ids: &Ids, sealer: Sealer, public: &[u8], sealed: &[u8], out: &mut Vec<u8>) -> Result<Head> {
    let at = out.len();
    let mut head = Head {
        kind: Kind::Page,
        codec: Codec::Stored,
        key: NO_KEY,
        plain: sealed.len() as u32,
        payload: 0,
        id: ids.page(public, sealed),
        nonce: [0; 12],
    };
    out.extend_from_slice(&[0; HEAD]);
    out.extend_from_slice(&(public.len() as u32).to_le_bytes());
    out.extend_from_slice(public);
    let from = out.len();
    out.extend_from_slice(sealed);
    if let Some((key, number)) = sealer {
        head.key = number;
        head.nonce = random_nonce()?;
        key.seal(&head.id, head.nonce, &head.aad(&ids.repository, public), out, from)?;
    }
    finish(out, at, head)
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
pub fn open_page<'a>(
    ids: &Ids, keys: &[Option<SessionKey>], record: &'a mut [u8],
) -> Result<(Id, &'a [u8], &'a [u8])> {
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
        let mut out = Vec::new();
        let sealer = key.map(|k| (k, 0));
        seal_block(&ids, sealer, Codec::Lz4, 1, &id, content, &mut Vec::new(), &mut out).expect("seals");
        (id, out)
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
