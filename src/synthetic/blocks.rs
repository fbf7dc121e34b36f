//! Random values in ggml's tensor types, made as blocks of random bits under a scale that gives them the deviation asked for: nothing is quantized, so
//! a file is made as fast as a disk takes it. Layouts as in `ggml-common.h`, what they mean as in `ggml-quants.c` (`dequantize_row_*`).

use rand::Rng;

/// ggml's tensor types that this room writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "ggml's names")]
pub enum TensorType {
    F32,
    F16,
    Q4_0,
    Q5_0,
    Q8_0,
    Q4_K,
    Q6_K,
}

/// Values of a small block and of a super-block (`QK4_0` and others, `QK_K`).
const SMALL: usize = 32;
const SUPER: usize = 256;

/// Scales of parts of a super-block are drawn from 16 to 31: large enough to differ, and small enough to leave the super-block's own, of half
/// precision, most of its bits.
const LEAST_SCALE: u8 = 16;
/// Root mean square of 16, 17, … 31.
const SCALE_SIZE: f32 = 23.947_859;

impl TensorType {
    pub const ALL: [Self; 7] = [Self::F32, Self::F16, Self::Q4_0, Self::Q5_0, Self::Q8_0, Self::Q4_K, Self::Q6_K];

    /// `enum ggml_type`
    pub fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q5_0 => 6,
            Self::Q8_0 => 8,
            Self::Q4_K => 12,
            Self::Q6_K => 14,
        }
    }

    /// Values of a block.
    pub fn block_length(self) -> u64 {
        match self {
            Self::F32 | Self::F16 => 1,
            Self::Q4_0 | Self::Q5_0 | Self::Q8_0 => SMALL as u64,
            Self::Q4_K | Self::Q6_K => SUPER as u64,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
            Self::Q4_0 => 18,
            Self::Q5_0 => 22,
            Self::Q8_0 => 34,
            Self::Q4_K => 144,
            Self::Q6_K => 210,
        }
    }

    /// Fills `data`, whole blocks, with values of this mean and standard deviation. A block's values have the mean 0 whatever is asked: only
    /// vectors have another, and they are not quantized.
    ///
    /// Quantized levels are uniform, and lie half a step off 0 in most types; the sign of the scale is random there, which evens it out.
    pub fn fill(self, rng: &mut impl Rng, mean: f32, deviation: f32, data: &mut [u8]) {
        rng.fill_bytes(data);
        match self {
            Self::F32 => {
                let (words, _) = data.as_chunks_mut::<4>();
                words.iter_mut().for_each(|word| *word = uniform(*word, mean, deviation).to_le_bytes());
            }
            Self::F16 => {
                // Half the bits of an F32's word are more than a half has.
                let (words, _) = data.as_chunks_mut::<2>();
                for word in words {
                    let spread = [0, 0, word[0], word[1]];
                    *word = half(uniform(spread, mean, deviation)).to_le_bytes();
                }
            }
            Self::Q4_0 => small_blocks::<18>(data, deviation / around_zero(16)),
            Self::Q5_0 => small_blocks::<22>(data, deviation / around_zero(32)),
            Self::Q8_0 => {
                // Root mean square of -127, … 127 with 0 twice: the level -128, which no quantizer gives, is made 0.
                let scale = half(deviation / 73.468).to_le_bytes();
                let (blocks, _) = data.as_chunks_mut::<34>();
                for [low, high, levels @ ..] in blocks {
                    [*low, *high] = scale;
                    levels.iter_mut().filter(|level| **level == 0x80).for_each(|level| *level = 0);
                }
            }
            Self::Q4_K => {
                // A level q of part j is d·sc·q − dmin·m: with m = sc and dmin = 7.5·d the mean of q goes.
                let scale = deviation / (uniform_levels(16) * SCALE_SIZE);
                let [scale, least] = [scale, 7.5 * scale].map(|x| half(x).to_le_bytes());
                let (blocks, _) = data.as_chunks_mut::<144>();
                for block in blocks {
                    block[..2].copy_from_slice(&scale);
                    block[2..4].copy_from_slice(&least);
                    let drawn: [u8; 8] = std::array::from_fn(|part| part_scale(block[4 + part]));
                    block[4..16].copy_from_slice(&packed(&drawn, &drawn));
                }
            }
            Self::Q6_K => {
                let scale = half(deviation / (around_zero(64) * SCALE_SIZE)).to_le_bytes();
                let (blocks, _) = data.as_chunks_mut::<210>();
                for block in blocks {
                    for part in &mut block[192..208] {
                        let sign = if *part & 0x80 == 0 { 1 } else { -1 };
                        *part = (sign * part_scale(*part) as i8).to_le_bytes()[0];
                    }
                    block[208..].copy_from_slice(&scale);
                }
            }
        }
    }
}

/// Blocks that are a scale and then bits of levels.
fn small_blocks<const BYTES: usize>(data: &mut [u8], scale: f32) {
    let scales = [scale, -scale].map(|scale| half(scale).to_le_bytes());
    let (blocks, _) = data.as_chunks_mut::<BYTES>();
    for block in blocks {
        let scale = scales[usize::from(block[0] & 1)];
        block[..2].copy_from_slice(&scale);
    }
}

fn part_scale(bits: u8) -> u8 {
    LEAST_SCALE + (bits & 15)
}

/// Standard deviation of `n` levels one apart.
fn uniform_levels(n: u32) -> f32 {
    ((n * n - 1) as f32 / 12.0).sqrt()
}

/// Root mean square of the levels -n/2, … n/2 - 1.
fn around_zero(n: u32) -> f32 {
    ((n * n - 1) as f32 / 12.0 + 0.25).sqrt()
}

/// Eight scales and eight minima of six bits each (`get_scale_min_k4`).
fn packed(scales: &[u8; 8], minima: &[u8; 8]) -> [u8; 12] {
    std::array::from_fn(|byte| match byte {
        0..4 => scales[byte] | scales[byte + 4] >> 4 << 6,
        4..8 => minima[byte - 4] | minima[byte] >> 4 << 6,
        _ => scales[byte - 4] & 15 | minima[byte - 4] << 4,
    })
}

/// A value of a uniform distribution: one of this deviation reaches √3 times as far.
fn uniform(word: [u8; 4], mean: f32, deviation: f32) -> f32 {
    let from_minus_one = i32::from_le_bytes(word) as f32 / (1u32 << 31) as f32;
    mean + 3f32.sqrt() * deviation * from_minus_one
}

/// The nearest half-precision number, even where two are as near; the largest for what is above.
fn half(x: f32) -> u16 {
    const SMALLEST_NORMAL: u32 = 0x3880_0000;
    const BIAS: u32 = 112 << 23;
    const LARGEST: u32 = 0x7BFF;
    let sign = x.to_bits() >> 16 & 0x8000;
    let size = x.to_bits() & 0x7FFF_FFFF;
    let half = if size < SMALLEST_NORMAL {
        (f32::from_bits(size) * (1u32 << 24) as f32).round_ties_even() as u32
    } else {
        ((size + 0xFFF + (size >> 13 & 1) - BIAS) >> 13).min(LARGEST)
    };
    (sign | half) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_the_nearest() {
        for (x, expected) in [
            (0.0, 0),
            (1.0, 0x3C00),
            (-2.0, 0xC000),
            (1.0 / 3.0, 0x3555),
            (65504.0, 0x7BFF),
            (1e9, 0x7BFF),
            ((-24f32).exp2(), 1),
            ((-14f32).exp2(), 0x0400),
            // Between two, the even one.
            (1.0 + (-11f32).exp2(), 0x3C00),
            (1.0 + 3.0 * (-11f32).exp2(), 0x3C02),
            // The largest below the smallest normal number rounds up to it.
            (0.000_061_035_15, 0x0400),
        ] {
            assert_eq!(half(x), expected, "{x}");
        }
    }

    /// As `get_scale_min_k4` takes them apart.
    #[test]
    fn six_bits_of_each_scale_are_where_ggml_looks() {
        let scales = [63, 0, 17, 31, 32, 1, 45, 62];
        let minima = [2, 61, 33, 16, 15, 48, 63, 7];
        let q = packed(&scales, &minima);
        for j in 0..8 {
            let (scale, least) = if j < 4 {
                (q[j] & 63, q[j + 4] & 63)
            } else {
                ((q[j + 4] & 15) | (q[j - 4] >> 6 << 4), (q[j + 4] >> 4) | (q[j] >> 6 << 4))
            };
            assert_eq!((scale, least), (scales[j], minima[j]), "{j}");
        }
    }
}
