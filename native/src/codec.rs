//! Compression of one block.
//!
//! Invariant: `decode(encode(x)) == x`, and `decode` never produces or
//! reserves more than the plain length it is told.
//! Formats: LZ4 block format (lz4_Block_format.md), Zstandard (RFC 8878).

use std::cell::RefCell;

use crate::error::{damaged, invalid, Result};

/// How content is coded in a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    Stored = 0,
    /// LZ4 block.
    Lz4 = 1,
    /// Zstandard frame.
    Zstd = 2,
}

impl Codec {
    /// From its number in a record head.
    pub fn from_u8(value: u8) -> Result<Self> {
        match value {
            0 => Ok(Self::Stored),
            1 => Ok(Self::Lz4),
            2 => Ok(Self::Zstd),
            _ => damaged(format!("unknown codec {value}")),
        }
    }
}

/// Content below this does not pay a probe.
const PROBE_MIN: usize = 32 << 10;
/// How much of a block the incompressibility probe looks at.
const PROBE: usize = 4 << 10;

thread_local! {
    static COMPRESSOR: RefCell<zstd_safe::CCtx<'static>> = RefCell::new(zstd_safe::CCtx::create());
    static DECOMPRESSOR: RefCell<zstd_safe::DCtx<'static>> = RefCell::new(zstd_safe::DCtx::create());
}

/// Whether a block looks like noise: samples spread over it have an
/// almost even distribution of bytes, so no byte-oriented coder gains on it.
///
/// For `n` uniformly random bytes the sum of squared counts is about
/// `n + n²/256`; text and machine code lie several times higher.
fn looks_random(content: &[u8]) -> bool {
    let mut counts = [0u32; 256];
    let step = content.len() / 16;
    for sample in content.chunks(step.max(1)).take(16) {
        for &byte in sample.iter().take(PROBE / 16) {
            counts[usize::from(byte)] += 1;
        }
    }
    let squares: u64 = counts.iter().map(|&c| u64::from(c) * u64::from(c)).sum();
    let n = PROBE as u64;
    squares < n + n * n / 256 + n * n / 1024
}

/// Room that `encode` needs for a content of this length.
pub fn bound(length: usize) -> usize {
    lz4_flex::block::get_maximum_output_size(length).max(zstd_safe::compress_bound(length))
}

/// Code `content` into the start of `out`, which has `bound` bytes: the codec used, and the length.
/// Falls back to `Stored` where coding would not save at least 1/32.
pub fn encode(codec: Codec, level: i32, content: &[u8], out: &mut [u8]) -> Result<(Codec, usize)> {
    let worth = content.len() - content.len() / 32;
    // LZ4 gives up on noise by itself, at 9 GB/s; Zstandard does not.
    let hopeless = codec == Codec::Zstd && content.len() >= PROBE_MIN && looks_random(content);
    if codec != Codec::Stored && !hopeless {
        let written = match codec {
            Codec::Lz4 => lz4_flex::block::compress_into(content, out).ok(),
            _ => COMPRESSOR.with_borrow_mut(|c| c.compress(out, content, level)).ok(),
        };
        match written {
            Some(length) if length < worth => return Ok((codec, length)),
            Some(_) => {}
            None => return invalid("compression failed"),
        }
    }
    out[..content.len()].copy_from_slice(content);
    Ok((Codec::Stored, content.len()))
}

/// Decode `stored` into `out`, which has exactly the plain length.
pub fn decode(codec: Codec, stored: &[u8], out: &mut [u8]) -> Result<()> {
    let length = match codec {
        Codec::Stored => {
            if stored.len() == out.len() {
                out.copy_from_slice(stored);
            }
            Some(stored.len())
        }
        Codec::Lz4 => lzzzz::lz4::decompress(stored, out).ok(),
        Codec::Zstd => DECOMPRESSOR.with_borrow_mut(|d| d.decompress(out, stored)).ok(),
    };
    if length == Some(out.len()) {
        Ok(())
    } else {
        damaged("content does not decode to its length")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_content_survives(content in proptest::collection::vec(any::<u8>(), 0..70_000), which in 0u8..3) {
            let codec = Codec::from_u8(which).expect("known");
            let mut stored = vec![0; bound(content.len())];
            let (used, length) = encode(codec, 1, &content, &mut stored).expect("encodes");
            prop_assert!(length <= content.len());
            let mut back = vec![0; content.len()];
            decode(used, &stored[..length], &mut back).expect("decodes");
            prop_assert_eq!(back, content);
        }

        #[test]
        fn garbage_is_refused_or_decodes_in_bounds(garbage in proptest::collection::vec(any::<u8>(), 0..5000), which in 0u8..3) {
            let mut out = vec![0; 4096];
            let _ = decode(Codec::from_u8(which).expect("known"), &garbage, &mut out);
        }
    }

    #[test]
    fn repetitive_content_shrinks_and_noise_is_stored() {
        let text = b"the quick brown fox ".repeat(4000);
        let mut out = vec![0; bound(text.len())];
        let (codec, length) = encode(Codec::Lz4, 1, &text, &mut out).expect("encodes");
        assert_eq!(codec, Codec::Lz4);
        assert!(length < text.len() / 10);
        let noise: Vec<u8> = (0u32..65536).map(|i| blake3::hash(&i.to_le_bytes()).as_bytes()[0]).collect();
        assert!(looks_random(&noise));
        assert_eq!(encode(Codec::Lz4, 1, &noise, &mut out).expect("encodes"), (Codec::Stored, noise.len()));
    }
}
