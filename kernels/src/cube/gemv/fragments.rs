//! Stored words as the fragments of `mma.m16n8k16`, one implementation a scheme, and the instructions that take them.

use crate::cube::decode::f16_bits_to_f32;
use cubecl::prelude::*;

/// What a scheme's words are, fixed when a kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Words of codes that hold 16 columns.
    pub words: u32,
    /// One scale a row.
    pub row_scale: bool,
    /// Scales a block of columns.
    pub block_scale: bool,
    /// Codes have a zero point a block.
    pub has_zero: bool,
    /// Codes are looked up in a table of pairs.
    pub has_table: bool,
    /// Pairs take every other column of four: (0, 2), (1, 3).
    pub interleaved: bool,
    /// Halves are bf16.
    pub is_bf16: bool,
}

const DENSE: Layout = Layout {
    words: 8,
    row_scale: false,
    block_scale: false,
    has_zero: false,
    has_table: false,
    interleaved: false,
    is_bf16: false,
};

const CODEBOOK_4: Layout = Layout { words: 2, block_scale: true, has_table: true, ..DENSE };
const AFFINE_4: Layout = Layout { words: 2, block_scale: true, has_zero: true, ..DENSE };
const INT_8: Layout = Layout { words: 4, row_scale: true, interleaved: true, ..DENSE };
const BF16: Layout = Layout { is_bf16: true, ..DENSE };

/// Turns stored words into pairs of halves.
#[cube]
pub trait Fragments: Send + Sync + 'static {
    /// What the words are.
    fn layout() -> comptime_type!(Layout);
    /// Returns pair `index` (0 to 7) of the 16 columns in the vectors from `first` on.
    fn pair<V: Size>(
        codes: &Array<Vector<u32, V>>,
        table: &Shared<[u32]>,
        lane_copy: u32,
        #[comptime] first: u32,
        #[comptime] index: u32,
        #[comptime] copies: u32,
    ) -> u32;
}

/// Returns word `index` of those that a lane loaded from vector `first` on.
#[cube]
fn word<V: Size>(codes: &Array<Vector<u32, V>>, #[comptime] first: u32, #[comptime] index: u32) -> u32 {
    let width = V::value().comptime() as u32;
    codes[comptime!((first + index / width) as usize)].extract(comptime!((index % width) as usize))
}

/// NF4 and FP4: a byte, two codes, is looked up as a pair.
pub struct Codebook4Pairs;

#[cube]
impl Fragments for Codebook4Pairs {
    fn layout() -> comptime_type!(Layout) {
        comptime!(CODEBOOK_4)
    }
    fn pair<V: Size>(
        codes: &Array<Vector<u32, V>>,
        table: &Shared<[u32]>,
        lane_copy: u32,
        #[comptime] first: u32,
        #[comptime] index: u32,
        #[comptime] copies: u32,
    ) -> u32 {
        // A byte's place is computed in bytes, so that a shift, a mask and the load are all that a lookup takes.
        let word = word::<V>(codes, first, comptime!(index / 4));
        let at = comptime!((index % 4) * 8);
        let scale = comptime!((4 * copies).ilog2());
        let shifted = if comptime!(at >= scale) {
            word >> comptime!(at.saturating_sub(scale))
        } else {
            word << comptime!(scale.saturating_sub(at))
        };
        let place = (shifted & comptime!(255u32 << scale)) | (lane_copy * 4u32);
        table[(place / 4u32) as usize]
    }
}

/// INT4 with a zero point: the code itself as a half; the zero point is taken off the sum.
pub struct Affine4Pairs;

#[cube]
impl Fragments for Affine4Pairs {
    fn layout() -> comptime_type!(Layout) {
        comptime!(AFFINE_4)
    }
    fn pair<V: Size>(
        codes: &Array<Vector<u32, V>>,
        _table: &Shared<[u32]>,
        _lane_copy: u32,
        #[comptime] first: u32,
        #[comptime] index: u32,
        #[comptime] _copies: u32,
    ) -> u32 {
        // 0x6400 is 1024 in fp16, whose last bits count ones: or-ing a code in adds it exactly.
        let byte = word::<V>(codes, first, comptime!(index / 4)) >> comptime!((index % 4) * 8);
        let biased = ((byte >> 4u32) & 15u32) | ((byte & 15u32) << 16u32) | 0x6400_6400u32;
        subtract_halves(biased, 0x6400_6400u32)
    }
}

/// INT8: bytes become halves by the same trick, two of four at a time.
pub struct Int8Pairs;

#[cube]
impl Fragments for Int8Pairs {
    fn layout() -> comptime_type!(Layout) {
        comptime!(INT_8)
    }
    fn pair<V: Size>(
        codes: &Array<Vector<u32, V>>,
        _table: &Shared<[u32]>,
        _lane_copy: u32,
        #[comptime] first: u32,
        #[comptime] index: u32,
        #[comptime] _copies: u32,
    ) -> u32 {
        let word = word::<V>(codes, first, comptime!(index / 2)) ^ 0x8080_8080u32;
        let biased = ((word >> comptime!((index % 2) * 8)) & 0x00ff_00ffu32) | 0x6400_6400u32;
        // 0x6480 is 1024 + 128.
        subtract_halves(biased, 0x6480_6480u32)
    }
}

/// fp16 as it is.
pub struct F16Pairs;

/// bf16 as it is.
pub struct Bf16Pairs;

macro_rules! dense_pairs {
    ($name:ident, $layout:ident) => {
        #[cube]
        impl Fragments for $name {
            fn layout() -> comptime_type!(Layout) {
                comptime!($layout)
            }
            fn pair<V: Size>(
                codes: &Array<Vector<u32, V>>,
                _table: &Shared<[u32]>,
                _lane_copy: u32,
                #[comptime] first: u32,
                #[comptime] index: u32,
                #[comptime] _copies: u32,
            ) -> u32 {
                word::<V>(codes, first, index)
            }
        }
    };
}

dense_pairs!(F16Pairs, DENSE);
dense_pairs!(Bf16Pairs, BF16);

/// Reads a variable: assembly would be given its address.
#[cube]
fn read_word(word: u32) -> u32 {
    word | 0u32
}

/// As [`read_word`].
#[cube]
fn read_float(value: f32) -> f32 {
    f32::reinterpret(u32::reinterpret(value))
}

/// Returns a word as one that the compiler knows nothing of: what it knows of a lane's number it would mask out again at every use.
#[cube]
pub(super) fn opaque(word: u32) -> u32 {
    let out: u32;
    gpu_asm!("mov.b32 {}, {};", out(_) out, in(_) word, options(pure, nomem));
    read_word(out)
}

#[cube]
fn subtract_halves(a: u32, b: u32) -> u32 {
    let out: u32;
    gpu_asm!("sub.f16x2 {}, {}, {};", out(_) out, in(_) a, in(_) b, options(pure, nomem));
    read_word(out)
}

/// Packs two numbers as halves, the first in the low half.
#[cube]
pub fn pack_pair(low: f32, high: f32, #[comptime] is_bf16: bool) -> u32 {
    let out: u32;
    let (low, high) = (read_float(low), read_float(high));
    if comptime!(is_bf16) {
        gpu_asm!("cvt.rn.bf16x2.f32 {}, {}, {};", out(_) out, in(_) high, in(_) low, options(pure, nomem));
    } else {
        gpu_asm!("cvt.rn.f16x2.f32 {}, {}, {};", out(_) out, in(_) high, in(_) low, options(pure, nomem));
    }
    read_word(out)
}

#[cube]
pub(super) fn low_half(pair: u32, #[comptime] is_bf16: bool) -> f32 {
    if comptime!(is_bf16) { f32::reinterpret(pair << 16u32) } else { f16_bits_to_f32(pair & 0xffffu32) }
}

#[cube]
pub(super) fn high_half(pair: u32, #[comptime] is_bf16: bool) -> f32 {
    if comptime!(is_bf16) { f32::reinterpret(pair & 0xffff_0000u32) } else { f16_bits_to_f32(pair >> 16u32) }
}

/// `d = a · b + c` of a 16×8×16 product: a four words, b two, c four floats a lane (PTX ISA, `mma.m16n8k16`).
#[cube]
#[expect(clippy::too_many_arguments, reason = "an instruction's operands")]
pub fn mma_16x8x16(
    a_0: u32,
    a_1: u32,
    a_2: u32,
    a_3: u32,
    b_0: u32,
    b_1: u32,
    c: Vector<f32, Const<4>>,
    #[comptime] is_bf16: bool,
) -> Vector<f32, Const<4>> {
    let d: Vector<f32, Const<4>>;
    // Taken apart: an operand that is a variable would be passed by its address.
    let (c_0, c_1, c_2, c_3) = (c.extract(0usize), c.extract(1usize), c.extract(2usize), c.extract(3usize));
    if comptime!(is_bf16) {
        gpu_asm!(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {d}, ",
            "{{{a_0}, {a_1}, {a_2}, {a_3}}}, {{{b_0}, {b_1}}}, {{{c_0}, {c_1}, {c_2}, {c_3}}};",
            a_0 = in(_) a_0, a_1 = in(_) a_1, a_2 = in(_) a_2, a_3 = in(_) a_3, b_0 = in(_) b_0, b_1 = in(_) b_1,
            c_0 = in(_) c_0, c_1 = in(_) c_1, c_2 = in(_) c_2, c_3 = in(_) c_3, d = out(_) d,
            options(pure, nomem),
        );
    } else {
        gpu_asm!(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {d}, ",
            "{{{a_0}, {a_1}, {a_2}, {a_3}}}, {{{b_0}, {b_1}}}, {{{c_0}, {c_1}, {c_2}, {c_3}}};",
            a_0 = in(_) a_0, a_1 = in(_) a_1, a_2 = in(_) a_2, a_3 = in(_) a_3, b_0 = in(_) b_0, b_1 = in(_) b_1,
            c_0 = in(_) c_0, c_1 = in(_) c_1, c_2 = in(_) c_2, c_3 = in(_) c_3, d = out(_) d,
            options(pure, nomem),
        );
    }
    d
}
