//! The signed dynamic map of 256 values in which block scales are quantized a second time (Dettmers 2015, "8-Bit
//! Approximations for Parallelism in Deep Learning"; bitsandbytes 0.50 `create_dynamic_map`).

use std::sync::OnceLock;

/// Returns the sorted map.
pub fn dynamic_map() -> &'static [f32; 256] {
    static MAP: OnceLock<[f32; 256]> = OnceLock::new();
    MAP.get_or_init(build)
}

fn build() -> [f32; 256] {
    let mut values = vec![0.0f32, 1.0];
    for exponent in 0..7u32 {
        let n_fractions = 1usize << exponent;
        let scale = 10f64.powi(exponent as i32 - 6) as f32;
        for mean in (0..n_fractions).map(|i| (boundary(i, n_fractions) + boundary(i + 1, n_fractions)) / 2.0) {
            values.push(scale * mean);
            values.push(-scale * mean);
        }
    }
    values.sort_by(f32::total_cmp);
    match values.try_into() {
        Ok(map) => map,
        Err(_) => unreachable!("2·(1 + 2 + … + 64) + 2 values are 256"),
    }
}

/// The i-th of `n + 1` evenly spaced points from 0.1 to 1, counted from the nearer end with fused multiply-adds: what
/// `torch.linspace` gives in f32, to the last bit.
fn boundary(i: usize, n: usize) -> f32 {
    let step = (1.0f32 - 0.1) / n as f32;
    if i < n.div_ceil(2) { step.mul_add(i as f32, 0.1) } else { (-step).mul_add((n - i) as f32, 1.0) }
}

/// Returns the index of the entry nearest to `value`.
pub fn nearest(value: f32) -> u8 {
    let map = dynamic_map();
    let upper = map.partition_point(|entry| *entry < value);
    if upper == 0 {
        return 0;
    }
    if upper == map.len() {
        return u8::MAX;
    }
    let middle = (map[upper - 1] + map[upper]) * 0.5;
    (if value > middle { upper } else { upper - 1 }) as u8
}
