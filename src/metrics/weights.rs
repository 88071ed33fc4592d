//! How far a stored weight is from the one it was made of.

use super::MetricsError;

/// Adds up a weight's error, slice by slice.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct WeightError {
    n_values: u64,
    weight_square_sum: f64,
    diff_square_sum: f64,
}

impl WeightError {
    /// Starts with no values.
    pub fn new() -> WeightError {
        WeightError::default()
    }

    /// Adds the values `weight` and what their stored form stands for.
    ///
    /// # Errors
    /// `WeightShape` where the two differ in length.
    pub fn push(&mut self, weight: &[f32], stored: &[f32]) -> Result<(), MetricsError> {
        if weight.len() != stored.len() {
            return Err(MetricsError::WeightShape { reference: weight.len(), candidate: stored.len() });
        }
        for (&w, &s) in weight.iter().zip(stored) {
            let (w, diff) = (f64::from(w), f64::from(w) - f64::from(s));
            self.weight_square_sum += w * w;
            self.diff_square_sum += diff * diff;
        }
        self.n_values += weight.len() as u64;
        Ok(())
    }

    /// Returns the mean squared error; 0 where nothing was pushed.
    pub fn mse(&self) -> f64 {
        if self.n_values == 0 { 0.0 } else { self.diff_square_sum / self.n_values as f64 }
    }

    /// Returns 10·log10(Σw²/Σ(w − ŵ)²) in dB; None where the error, or the weight, is 0.
    pub fn sqnr_db(&self) -> Option<f64> {
        sqnr_db(self.weight_square_sum, self.diff_square_sum)
    }
}

/// Returns the signal to quantization noise ratio in dB; None where there is no noise, or no signal.
pub(super) fn sqnr_db(signal_square_sum: f64, noise_square_sum: f64) -> Option<f64> {
    (signal_square_sum > 0.0 && noise_square_sum > 0.0)
        .then(|| 10.0 * (signal_square_sum.log10() - noise_square_sum.log10()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weight_errors_add_up_over_slices() {
        let mut error = WeightError::new();
        error.push(&[1.0, -2.0], &[1.0, -1.0]).unwrap();
        error.push(&[2.0], &[2.0]).unwrap();
        assert!((error.mse() - 1.0 / 3.0).abs() < 1e-12);
        assert!((error.sqnr_db().unwrap() - 10.0 * 9f64.log10()).abs() < 1e-12);
        assert!(matches!(error.push(&[1.0], &[]), Err(MetricsError::WeightShape { .. })));
    }

    #[test]
    fn an_exact_weight_has_no_sqnr() {
        let mut error = WeightError::new();
        error.push(&[1.0, 0.5], &[1.0, 0.5]).unwrap();
        assert_eq!((error.mse(), error.sqnr_db()), (0.0, None));
    }
}
