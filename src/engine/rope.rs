//! Rotary position embedding: inverse frequencies, and how longer contexts scale them.

use std::f64::consts::TAU;

/// How rotary frequencies are scaled. Sources: transformers 5.24, `modeling_rope_utils.py`, the function named at each.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// Each frequency divided by a number of its own: how GGUF files hold Llama 3.1's scaling.
    Divided {
        by: Vec<f64>, // [rotary_dim / 2]
        /// Multiplies cosines and sines.
        attention_factor: f64,
    },
    /// Positions divided by `factor` (`_compute_linear_scaling_rope_parameters`).
    Linear {
        factor: f64,
    },
    /// NTK-aware: beyond `original_max_position` tokens theta grows with the sequence (`_compute_dynamic_ntk_parameters`).
    Dynamic {
        factor: f64,
        original_max_position: f64,
    },
    /// YaRN (Peng and others 2023): high frequencies kept, low ones divided, a ramp between (`_compute_yarn_parameters`).
    Yarn {
        factor: f64,
        original_max_position: f64,
        /// Rotations over the original context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which it is divided by `factor`.
        beta_slow: f64,
        /// Multiplies cosines and sines.
        attention_factor: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// A divisor for each frequency, one set up to `original_max_position` tokens and one beyond (`_compute_longrope_parameters`).
    LongRope {
        short_factor: Vec<f64>, // [rotary_dim / 2]
        long_factor: Vec<f64>,  // [rotary_dim / 2]
        original_max_position: f64,
        /// Multiplies cosines and sines.
        attention_factor: f64,
    },
    /// Llama 3.1's piecewise scaling (`_compute_llama3_parameters`).
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position: f64,
    },
}

/// Rotary position embedding, rotate-half form.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    pub theta: f64,
    /// Leading values of each head that are rotated; even, at most `head_dim`. The rest pass as they are.
    pub rotary_dim: usize,
    pub scaling: RopeScaling,
}

impl RopeSpec {
    /// Returns the `rotary_dim / 2` inverse frequencies in radians per position for a sequence of `n_seq` tokens, those in the
    /// cache included. Only where [`depends_on_length`](Self::depends_on_length) does `n_seq` matter; keys that are in the
    /// cache then keep the rotation that they were written with, as in the reference implementation.
    pub fn inverse_frequencies(&self, n_seq: usize) -> Vec<f64> {
        let plain = |theta: f64, i: usize| theta.powf(-2.0 * i as f64 / self.rotary_dim as f64);
        let scale = |i: usize| {
            let frequency = plain(self.theta, i);
            match &self.scaling {
                RopeScaling::None => frequency,
                RopeScaling::Divided { by, .. } => frequency / by[i],
                RopeScaling::Linear { factor } => frequency / factor,
                RopeScaling::Dynamic { factor, original_max_position } => {
                    let stretch = (n_seq as f64 / original_max_position).max(1.0);
                    let dim = self.rotary_dim as f64;
                    let grown = (factor * stretch - (factor - 1.0)).powf(dim / (dim - 2.0));
                    plain(self.theta * grown, i)
                }
                RopeScaling::Yarn { factor, .. } => {
                    let kept = 1.0 - self.yarn_ramp(i);
                    frequency / factor * (1.0 - kept) + frequency * kept
                }
                RopeScaling::LongRope { short_factor, long_factor, original_max_position, .. } => {
                    let is_long = n_seq as f64 > *original_max_position;
                    frequency / if is_long { long_factor[i] } else { short_factor[i] }
                }
                RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                    let wavelength = TAU / frequency;
                    // In this order, so that factors that are the wrong way round give what transformers makes of them.
                    if wavelength > original_max_position / low_freq_factor {
                        frequency / factor
                    } else if wavelength < original_max_position / high_freq_factor {
                        frequency
                    } else {
                        let smooth = (original_max_position / wavelength - low_freq_factor)
                            / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    }
                }
            }
        };
        (0..self.rotary_dim / 2).map(scale).collect()
    }

    /// Returns the factor on cosines and sines: 1 unless the scaling has one.
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. }
            | RopeScaling::LongRope { attention_factor, .. }
            | RopeScaling::Divided { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    /// Returns true where frequencies change with the length of the sequence.
    pub fn depends_on_length(&self) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { .. } | RopeScaling::LongRope { .. })
    }

    /// Returns how far dimension `i` lies between YaRN's kept (0) and divided (1) frequencies.
    fn yarn_ramp(&self, i: usize) -> f64 {
        let RopeScaling::Yarn { original_max_position, beta_fast, beta_slow, truncate, .. } = self.scaling else {
            return 0.0;
        };
        let dim = self.rotary_dim as f64;
        let dim_of =
            |n_rotations: f64| dim * (original_max_position / (n_rotations * TAU)).ln() / (2.0 * self.theta.ln());
        let (low, high) = (dim_of(beta_fast), dim_of(beta_slow));
        let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        let high = if low == high { high + 0.001 } else { high };
        ((i as f64 - low) / (high - low)).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divided_frequencies_are_what_llama3_scaling_gives() {
        let scaling = RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192.0,
        };
        let (plain, scaled) = (frequencies(RopeScaling::None, 1), frequencies(scaling, 1));
        let by = plain.iter().zip(&scaled).map(|(plain, scaled)| plain / scaled).collect();
        for (found, expected) in frequencies(RopeScaling::Divided { by, attention_factor: 1.0 }, 1).iter().zip(&scaled)
        {
            assert!((found / expected - 1.0).abs() < 1e-12);
        }
    }

    fn frequencies(scaling: RopeScaling, n_seq: usize) -> Vec<f64> {
        RopeSpec { theta: 500_000.0, rotary_dim: 128, scaling }.inverse_frequencies(n_seq)
    }

    #[test]
    fn llama3_scaling_keeps_high_frequencies_and_divides_low_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192.0,
        };
        let (plain, scaled) = (frequencies(RopeScaling::None, 1), frequencies(scaling, 1));
        assert_eq!(plain.len(), 64);
        assert_eq!(scaled[0], plain[0]);
        assert!((scaled[63] - plain[63] / 32.0).abs() < 1e-15);
        assert!(scaled.iter().zip(&plain).any(|(s, p)| *s < *p && *s > *p / 32.0));
    }

    #[test]
    fn yarn_keeps_high_frequencies_and_divides_low_ones() {
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            original_max_position: 32_768.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 1.1,
            truncate: true,
        };
        let (plain, scaled) = (frequencies(RopeScaling::None, 1), frequencies(scaling, 1));
        assert_eq!(scaled[0], plain[0]);
        assert!((scaled[63] - plain[63] / 4.0).abs() < 1e-15);
        assert!(scaled.iter().zip(&plain).any(|(s, p)| *s < 0.99 * *p && *s > 0.26 * *p));
    }

    #[test]
    fn dynamic_scaling_begins_where_the_original_context_ends() {
        let scaling = RopeScaling::Dynamic { factor: 2.0, original_max_position: 1024.0 };
        let plain = frequencies(RopeScaling::None, 1);
        assert_eq!(frequencies(scaling.clone(), 1024), plain);
        let longer = frequencies(scaling, 2048);
        assert_eq!(longer[0], plain[0]);
        // The last frequency of 2x the context is that of theta times 3^(128/126), to the power 126/128: a third.
        assert!((longer[63] * 3.0 / plain[63] - 1.0).abs() < 1e-12);
    }
}
