//! Digests: keyed BLAKE3 for identity, XXH3 for framing against accidents.

use xxhash_rust::xxh3::xxh3_64;

/// A block id, page id, pack name or digest.
pub type Id = [u8; 32];

/// BLAKE3-256.
pub fn b3(parts: &[&[u8]]) -> Id {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize().into()
}

/// BLAKE3-256 keyed.
pub fn b3k(key: &Id, parts: &[&[u8]]) -> Id {
    if let [one] = parts {
        return blake3::keyed_hash(key, one).into();
    }
    let mut hasher = blake3::Hasher::new_keyed(key);
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize().into()
}

/// BLAKE3-256 in key derivation mode.
pub fn b3d(context: &str, material: &[u8]) -> Id {
    blake3::derive_key(context, material)
}

/// XXH3-64, seed 0.
pub fn xxh3(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut out = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        out.push(char::from(DIGITS[usize::from(byte >> 4)]));
        out.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    out
}
