//! Encryption of one record.
//!
//! Invariant: a key encrypts one content only (it is derived from the session key and
//! the content's id), and a record opens only as what it was sealed as:
//! repository, kind, codec, length and id are additional data.
//! AES-256-GCM: NIST SP 800-38D. ChaCha20-Poly1305: RFC 8439.

use aws_lc_rs::aead::{Aad, LessSafeKey, Nonce, UnboundKey, AES_256_GCM, CHACHA20_POLY1305};

use crate::digest::{b3k, Id};
use crate::error::{damaged, invalid, Result};

/// Bytes that a tag adds.
pub const TAG: usize = 16;

/// A cipher, by its number in an envelope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cipher {
    /// AES-256-GCM.
    Aes,
    /// ChaCha20-Poly1305.
    ChaCha,
}

impl Cipher {
    /// From its number in an envelope.
    pub fn from_u8(value: u8) -> Result<Self> {
        match value {
            1 => Ok(Self::Aes),
            2 => Ok(Self::ChaCha),
            _ => invalid(format!("unknown cipher {value}")),
        }
    }
}

/// A session key with its cipher.
#[derive(Clone)]
pub struct SessionKey {
    /// Which cipher its records use.
    pub cipher: Cipher,
    /// The session key itself.
    pub key: Id,
}

impl SessionKey {
    fn for_id(&self, id: &Id) -> Result<LessSafeKey> {
        let algorithm = match self.cipher {
            Cipher::Aes => &AES_256_GCM,
            Cipher::ChaCha => &CHACHA20_POLY1305,
        };
        match UnboundKey::new(algorithm, &b3k(&self.key, &[id])) {
            Ok(key) => Ok(LessSafeKey::new(key)),
            Err(_) => invalid("the cipher refuses its key"),
        }
    }

    /// Encrypt `data` in place; its tag.
    pub fn seal(&self, id: &Id, nonce: [u8; 12], aad: &[u8], data: &mut [u8]) -> Result<[u8; TAG]> {
        let key = self.for_id(id)?;
        let nonce = Nonce::assume_unique_for_key(nonce);
        let tag = key.seal_in_place_separate_tag(nonce, Aad::from(aad), data).ok();
        match tag.and_then(|tag| tag.as_ref().try_into().ok()) {
            Some(tag) => Ok(tag),
            None => invalid("encryption failed"),
        }
    }

    /// Decrypt `data` (ciphertext and tag) in place; the plain bytes are returned.
    pub fn open<'a>(&self, id: &Id, nonce: [u8; 12], aad: &[u8], data: &'a mut [u8]) -> Result<&'a mut [u8]> {
        let key = self.for_id(id)?;
        match key.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(aad), data) {
            Ok(plain) => Ok(plain),
            Err(_) => damaged("authentication fails: changed, or not the record it claims to be"),
        }
    }
}

/// Random bytes for a nonce.
pub fn random_nonce() -> Result<[u8; 12]> {
    let mut nonce = [0; 12];
    match aws_lc_rs::rand::fill(&mut nonce) {
        Ok(()) => Ok(nonce),
        Err(_) => invalid("no random numbers"),
    }
}

/// Whether this processor has instructions for AES and carry-less multiplication.
pub fn aes_is_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    false
}
