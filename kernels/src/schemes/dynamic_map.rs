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

/// Returns the 255 points halfway between neighbours: an entry is the nearest one to what lies above as many of them as its index.
pub fn middles() -> [f32; 255] {
    let map = dynamic_map();
    std::array::from_fn(|i| (map[i] + map[i + 1]) * 0.5)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_entry_is_the_number_of_middles_below() {
        let by_middles = |value: f32| middles().iter().filter(|middle| **middle < value).count() as u8;
        let mut probes = vec![0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.5, -1.5];
        for value in dynamic_map().iter().chain(&middles()) {
            probes.extend([*value, value.next_up(), value.next_down()]);
        }
        for value in probes {
            assert_eq!(nearest(value), by_middles(value), "{value}");
        }
    }
}
