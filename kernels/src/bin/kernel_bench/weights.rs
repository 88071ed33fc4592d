//! Random matrices: what is in them does not matter to a clock, so they are drawn packed.

use labpipe_kernels::dense::DenseType;
use labpipe_kernels::weight::{DenseWeight, HostWeight, SharedBytes};
use labpipe_kernels::{Packed, SchemeSpec};

pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.next() as f32 / u32::MAX as f32 - 0.5) * 0.2).collect()
    }
}

/// Makes a packed matrix of random codes: packing 50 million values on the host would take longer than the measurement.
pub fn random_weight(kind: &str, n: usize, k: usize, random: &mut Random) -> HostWeight {
    let spec =
        |scheme: &str, block_size, double_quant| SchemeSpec { block_size, double_quant, ..SchemeSpec::new(scheme) };
    let words = |n: usize, random: &mut Random| (0..n).flat_map(|_| random.next().to_le_bytes()).collect::<Vec<u8>>();
    match kind {
        "f16" => {
            let values: Vec<half::f16> = random.floats(n * k).into_iter().map(half::f16::from_f32).collect();
            let bytes = SharedBytes::from_values(values);
            HostWeight::Dense(DenseWeight { dtype: DenseType::F16, n_rows: n, n_cols: k, bytes })
        }
        "int8" => HostWeight::Packed(Packed {
            spec: spec("int8", None, false),
            n_rows: n,
            n_cols: k,
            codes: words(n * k / 4, random),
            scales: random.floats(n).iter().map(|v| v.abs()).collect(),
            zeros: Vec::new(),
            nested: None,
        }),
        _ => {
            let double_quant = kind == "nf4-double";
            let name = if kind == "int4" { "int4" } else { "nf4" };
            let block = if kind == "int4" { 128 } else { 64 };
            let scales: Vec<f32> = random.floats(n * k / block).iter().map(|v| 0.01 + v.abs()).collect();
            let nested = double_quant.then(|| labpipe_kernels::schemes::nf4::nest(&scales));
            let zeros = (0..n * k / block).map(|_| (random.next() % 16) as u8).collect();
            HostWeight::Packed(Packed {
                spec: spec(name, Some(block), double_quant),
                n_rows: n,
                n_cols: k,
                codes: words(n * k / 8, random),
                scales: match &nested {
                    Some(nested) => labpipe_kernels::schemes::nf4::decode_nested(nested),
                    None => scales,
                },
                zeros,
                nested,
            })
        }
    }
}
