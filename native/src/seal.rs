//! Keys for people and sessions: wrapping, agreement, signatures. Small data, called a few times a run.
//!
//! Invariant: what does not open, agree or verify is an error, never other bytes.
//! AES-256-GCM: NIST SP 800-38D. X25519: RFC 7748. Ed25519: RFC 8032.

use aws_lc_rs::aead::{Aad, LessSafeKey, Nonce, UnboundKey, AES_256_GCM};
use aws_lc_rs::agreement::{agree, PrivateKey, UnparsedPublicKey as PeerKey, X25519};
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair, UnparsedPublicKey, ED25519};

use crate::digest::Id;
use crate::error::{damaged, invalid, Error, Result};

fn aes(key: &Id) -> Result<LessSafeKey> {
    match UnboundKey::new(&AES_256_GCM, key) {
        Ok(key) => Ok(LessSafeKey::new(key)),
        Err(_) => invalid("the cipher refuses its key"),
    }
}

/// Ciphertext and tag. A key and a nonce are used together once.
pub fn wrap(key: &Id, nonce: [u8; 12], plain: &[u8], data: &[u8]) -> Result<Vec<u8>> {
    let mut out = plain.to_vec();
    match aes(key)?.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(data), &mut out) {
        Ok(()) => Ok(out),
        Err(_) => invalid("encryption failed"),
    }
}

/// The plain bytes of what `wrap` made.
pub fn unwrap(key: &Id, nonce: [u8; 12], sealed: &[u8], data: &[u8]) -> Result<Vec<u8>> {
    let mut out = sealed.to_vec();
    match aes(key)?.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(data), &mut out) {
        Ok(plain) => Ok(plain.to_vec()),
        Err(_) => damaged("it does not open with this key"),
    }
}

fn x25519(private: &Id) -> Result<PrivateKey> {
    PrivateKey::from_private_key(&X25519, private).map_err(|_| Error::Invalid("no X25519 private key".into()))
}

/// The public key of an X25519 private key.
pub fn agreement_public(private: &Id) -> Result<Vec<u8>> {
    match x25519(private)?.compute_public_key() {
        Ok(key) => Ok(key.as_ref().to_vec()),
        Err(_) => invalid("no X25519 private key"),
    }
}

/// The secret that two X25519 keys share. An all-zero one is refused.
pub fn agreement(private: &Id, public: &[u8]) -> Result<Vec<u8>> {
    let failed = Error::Damaged("the keys share no secret".into());
    agree(&x25519(private)?, PeerKey::new(&X25519, public), failed, |secret| Ok(secret.to_vec()))
}

fn ed25519(seed: &Id) -> Result<Ed25519KeyPair> {
    Ed25519KeyPair::from_seed_unchecked(seed).map_err(|_| Error::Invalid("no Ed25519 seed".into()))
}

/// The public key of a signing seed.
pub fn signing_public(seed: &Id) -> Result<Vec<u8>> {
    Ok(ed25519(seed)?.public_key().as_ref().to_vec())
}

/// A signature, 64 bytes.
pub fn sign(seed: &Id, message: &[u8]) -> Result<Vec<u8>> {
    Ok(ed25519(seed)?.sign(message).as_ref().to_vec())
}

/// Whether a signature is that of the message by this key.
pub fn is_signed(public: &[u8], signature: &[u8], message: &[u8]) -> bool {
    UnparsedPublicKey::new(&ED25519, public).verify(message, signature).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn unhex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex")).collect()
    }

    fn key(text: &str) -> Id {
        unhex(text).try_into().expect("32 bytes")
    }

    #[test]
    fn x25519_as_in_rfc_7748() {
        let alice = key("77076d0a7318a57d3c16c17251b26645df4c26ae7a4b64d1d6f6b1f0f0e0c0a0");
        let bob = key("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb");
        let shared = agreement(&alice, &agreement_public(&bob).expect("public")).expect("agrees");
        assert_eq!(shared, agreement(&bob, &agreement_public(&alice).expect("public")).expect("agrees"));
        assert_eq!(
            agreement_public(&bob).expect("public"),
            unhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
        );
        assert!(agreement(&alice, &[0; 32]).is_err());
        assert!(agreement(&alice, &[9; 31]).is_err());
    }

    #[test]
    fn ed25519_as_in_rfc_8032() {
        let seed = key("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60");
        let public = signing_public(&seed).expect("public");
        assert_eq!(public, unhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"));
        let signature = sign(&seed, b"").expect("signs");
        assert!(signature.starts_with(&unhex("e5564300c360ac729086e2cc806e828a")));
        assert!(is_signed(&public, &signature, b""));
        assert!(!is_signed(&public, &signature, b"x"));
        assert!(!is_signed(&public[1..], &signature, b"") && !is_signed(&public, &signature[1..], b""));
    }

    proptest! {
        #[test]
        fn what_is_wrapped_opens_and_nothing_else(plain in proptest::collection::vec(any::<u8>(), 0..200), data in proptest::collection::vec(any::<u8>(), 0..50), at: prop::sample::Index) {
            let sealed = wrap(&[3; 32], [1; 12], &plain, &data).expect("wraps");
            prop_assert_eq!(unwrap(&[3; 32], [1; 12], &sealed, &data).expect("opens"), plain);
            let mut other = sealed.clone();
            let position = at.index(other.len());
            other[position] ^= 1;
            prop_assert!(unwrap(&[3; 32], [1; 12], &other, &data).is_err());
            prop_assert!(unwrap(&[4; 32], [1; 12], &sealed, &data).is_err());
        }
    }
}
