//! How far a module's output is from the reference's, accumulated row by row.

use super::{MetricsError, percentile};
use crate::artifact::ModuleDiff;

/// Adds up rows of one module's output. It keeps one cosine per token, and sums.
#[derive(Debug, Clone)]
pub struct ActivationDiff {
    width: usize,
    /// Cosine similarity of each row.
    cosines: Vec<f64>,
    reference_square_sum: f64,
    diff_square_sum: f64,
    reference_abs_sum: f64,
    reference_abs_max: f64,
    diff_abs_max: f64,
}

impl ActivationDiff {
    /// Starts with no rows; each will have `width` values.
    pub fn new(width: usize) -> ActivationDiff {
        ActivationDiff {
            width,
            cosines: Vec::new(),
            reference_square_sum: 0.0,
            diff_square_sum: 0.0,
            reference_abs_sum: 0.0,
            reference_abs_max: 0.0,
            diff_abs_max: 0.0,
        }
    }

    /// Returns the number of rows (tokens) pushed so far.
    pub fn n_tokens(&self) -> usize {
        self.cosines.len()
    }

    /// Adds rows: the same tokens' values from both models.
    ///
    /// # Shapes
    /// Both `[n_tokens, width]`, row-major.
    ///
    /// # Errors
    /// `RowShape` where the two differ in length or do not hold whole rows, `ValueNotFinite` for NaN and infinities.
    /// What was pushed before stays.
    pub fn push_rows(&mut self, reference: &[f32], candidate: &[f32]) -> Result<(), MetricsError> {
        if self.width == 0 || reference.len() != candidate.len() || !reference.len().is_multiple_of(self.width) {
            return Err(MetricsError::RowShape {
                width: self.width,
                reference: reference.len(),
                candidate: candidate.len(),
            });
        }
        self.check_finite("reference", reference)?;
        self.check_finite("candidate", candidate)?;
        for (reference_row, candidate_row) in reference.chunks_exact(self.width).zip(candidate.chunks_exact(self.width))
        {
            self.push_row(reference_row, candidate_row);
        }
        Ok(())
    }

    fn check_finite(&self, which: &'static str, values: &[f32]) -> Result<(), MetricsError> {
        match values.iter().enumerate().find(|(_, value)| !value.is_finite()) {
            None => Ok(()),
            Some((idx, &value)) => Err(MetricsError::ValueNotFinite {
                which,
                row_idx: self.cosines.len() + idx / self.width,
                column_idx: idx % self.width,
                value,
            }),
        }
    }

    fn push_row(&mut self, reference: &[f32], candidate: &[f32]) {
        let (mut dot, mut reference_square, mut candidate_square) = (0.0, 0.0, 0.0);
        for (&r, &c) in reference.iter().zip(candidate) {
            let (r, c) = (f64::from(r), f64::from(c));
            let diff = r - c;
            dot += r * c;
            reference_square += r * r;
            candidate_square += c * c;
            self.diff_square_sum += diff * diff;
            self.reference_abs_sum += r.abs();
            self.reference_abs_max = self.reference_abs_max.max(r.abs());
            self.diff_abs_max = self.diff_abs_max.max(diff.abs());
        }
        self.reference_square_sum += reference_square;
        self.cosines.push(row_cosine(dot, reference_square, candidate_square));
    }

    /// Returns the module's row of a `diff` record.
    ///
    /// # Errors
    /// `NoRows` where nothing was pushed.
    pub fn finish(
        self,
        module: impl Into<String>,
        layer_idx: Option<usize>,
        op: impl Into<String>,
    ) -> Result<ModuleDiff, MetricsError> {
        let module = module.into();
        let n_tokens = self.cosines.len();
        if n_tokens == 0 {
            return Err(MetricsError::NoRows { module });
        }
        let n_values = (n_tokens * self.width) as f64;
        let cosine = self.cosines.iter().sum::<f64>() / n_tokens as f64;
        let mut sorted = self.cosines;
        sorted.sort_by(f64::total_cmp);
        Ok(ModuleDiff {
            module,
            layer_idx,
            op: op.into(),
            n_tokens,
            mse: self.diff_square_sum / n_values,
            cosine,
            cosine_p01: percentile(&sorted, 1.0),
            sqnr_db: super::weights::sqnr_db(self.reference_square_sum, self.diff_square_sum),
            rel_frobenius: (self.reference_square_sum > 0.0)
                .then(|| (self.diff_square_sum / self.reference_square_sum).sqrt()),
            max_abs_diff: self.diff_abs_max,
            ref_mean_abs: self.reference_abs_sum / n_values,
            ref_max_abs: self.reference_abs_max,
        })
    }
}

/// Returns the cosine similarity of two rows. A row of zeros has no direction: 1 where both are zero (they agree),
/// 0 where one is.
fn row_cosine(dot: f64, reference_square: f64, candidate_square: f64) -> f64 {
    match (reference_square == 0.0, candidate_square == 0.0) {
        (true, true) => 1.0,
        (true, false) | (false, true) => 0.0,
        (false, false) => (dot / (reference_square * candidate_square).sqrt()).clamp(-1.0, 1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_equal_a_calculation_by_hand() {
        // numpy in f64: two rows of three values.
        let mut diff = ActivationDiff::new(3);
        diff.push_rows(&[1.0, 2.0, 2.0], &[1.0, 2.0, 1.0]).unwrap();
        diff.push_rows(&[0.0, 3.0, -4.0], &[0.0, 4.0, -3.0]).unwrap();
        let row = diff.finish("model.norm", None, "norm").unwrap();
        assert_eq!((row.n_tokens, row.op.as_str(), row.layer_idx), (2, "norm", None));
        assert!((row.mse - 0.5).abs() < 1e-12);
        let cosines = [7.0 / (3.0 * 6f64.sqrt()), 24.0 / 25.0];
        assert!((row.cosine - (cosines[0] + cosines[1]) / 2.0).abs() < 1e-12);
        assert!((row.cosine_p01 - (cosines[0] + (cosines[1] - cosines[0]) * 0.01)).abs() < 1e-12);
        assert!((row.sqnr_db.unwrap() - 10.0 * (34.0f64 / 3.0).log10()).abs() < 1e-12);
        assert!((row.rel_frobenius.unwrap() - (3.0f64 / 34.0).sqrt()).abs() < 1e-12);
        assert_eq!((row.max_abs_diff, row.ref_mean_abs, row.ref_max_abs), (1.0, 2.0, 4.0));
    }

    #[test]
    fn equal_values_have_no_sqnr_and_zero_rows_are_equal() {
        let mut diff = ActivationDiff::new(2);
        diff.push_rows(&[0.0, 0.0, 1.0, 1.0], &[0.0, 0.0, 1.0, 1.0]).unwrap();
        let row = diff.finish("m", Some(0), "act").unwrap();
        assert_eq!((row.mse, row.sqnr_db, row.cosine), (0.0, None, 1.0));
        let mut zero = ActivationDiff::new(2);
        zero.push_rows(&[0.0, 0.0], &[1.0, 0.0]).unwrap();
        let row = zero.finish("m", Some(0), "act").unwrap();
        assert_eq!((row.cosine, row.rel_frobenius, row.sqnr_db), (0.0, None, None));
    }

    #[test]
    fn ragged_rows_and_nan_are_errors_that_name_the_place() {
        let mut diff = ActivationDiff::new(2);
        assert!(matches!(diff.push_rows(&[1.0; 3], &[1.0; 3]), Err(MetricsError::RowShape { width: 2, .. })));
        assert!(matches!(diff.push_rows(&[1.0; 4], &[1.0; 2]), Err(MetricsError::RowShape { .. })));
        diff.push_rows(&[1.0; 2], &[1.0; 2]).unwrap();
        let error = diff.push_rows(&[1.0; 4], &[1.0, 1.0, 1.0, f32::NAN]).unwrap_err();
        assert!(error.to_string().contains("candidate value NaN at row 2, column 1"), "{error}");
        assert_eq!(diff.n_tokens(), 1);
        assert!(matches!(ActivationDiff::new(0).push_rows(&[], &[]), Err(MetricsError::RowShape { .. })));
        assert!(matches!(ActivationDiff::new(4).finish("x", None, "y"), Err(MetricsError::NoRows { .. })));
    }
}
