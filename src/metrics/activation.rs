//! Difference of one module's output between a reference and a candidate, accumulated in f64 as rows come.

use super::MetricsError;
use super::statistics::percentile;
use crate::artifact::ModuleDiff;

/// Sums over the rows seen so far.
#[derive(Debug, Clone)]
pub struct ActivationDiff {
    width: usize,
    n_values: usize,
    noise: f64,
    signal: f64,
    sum_abs: f64,
    max_abs: f64,
    max_abs_diff: f64,
    cosines: Vec<f64>,
}

impl ActivationDiff {
    /// Starts for rows of `width` values.
    pub fn new(width: usize) -> ActivationDiff {
        ActivationDiff {
            width: width.max(1),
            n_values: 0,
            noise: 0.0,
            signal: 0.0,
            sum_abs: 0.0,
            max_abs: 0.0,
            max_abs_diff: 0.0,
            cosines: Vec::new(),
        }
    }

    /// Adds rows, one a token.
    ///
    /// # Shapes
    /// Both `[n, width]`, row-major.
    ///
    /// # Errors
    /// `Rows` where the two differ in length or do not hold whole rows, `NotFinite`.
    pub fn push_rows(&mut self, reference: &[f32], candidate: &[f32]) -> Result<(), MetricsError> {
        if reference.len() != candidate.len() || !reference.len().is_multiple_of(self.width) {
            return Err(MetricsError::Rows {
                width: self.width,
                reference: reference.len(),
                candidate: candidate.len(),
            });
        }
        for (what, values) in [("the reference", reference), ("the candidate", candidate)] {
            if let Some(index) = values.iter().position(|value| !value.is_finite()) {
                return Err(MetricsError::NotFinite { what, index, value: values[index] });
            }
        }
        for (reference, candidate) in reference.chunks_exact(self.width).zip(candidate.chunks_exact(self.width)) {
            self.push_row(reference, candidate);
        }
        Ok(())
    }

    fn push_row(&mut self, reference: &[f32], candidate: &[f32]) {
        let (mut dot, mut rr, mut cc, mut noise) = (0.0f64, 0.0f64, 0.0f64, 0.0f64);
        for (r, c) in reference.iter().zip(candidate) {
            let (r, c) = (f64::from(*r), f64::from(*c));
            let delta = r - c;
            dot += r * c;
            rr += r * r;
            cc += c * c;
            noise += delta * delta;
            self.sum_abs += r.abs();
            self.max_abs = self.max_abs.max(r.abs());
            self.max_abs_diff = self.max_abs_diff.max(delta.abs());
        }
        self.n_values += reference.len();
        self.signal += rr;
        self.noise += noise;
        // A row of zeros points nowhere: alike if both are zeros, else not at all.
        let norms = rr.sqrt() * cc.sqrt();
        self.cosines.push(if norms > 0.0 { (dot / norms).clamp(-1.0, 1.0) } else { f64::from(rr == cc) });
    }

    /// Returns the module's row of the record.
    pub fn finish(mut self, module: &str, layer_idx: Option<usize>, op: &str) -> ModuleDiff {
        let n = self.n_values.max(1) as f64;
        let n_tokens = self.cosines.len();
        let cosine = self.cosines.iter().sum::<f64>() / n_tokens.max(1) as f64;
        self.cosines.sort_by(f64::total_cmp);
        ModuleDiff {
            module: module.to_owned(),
            layer_idx,
            op: op.to_owned(),
            n_tokens,
            mse: self.noise / n,
            cosine,
            cosine_p01: if n_tokens == 0 { 0.0 } else { percentile(&self.cosines, 1.0) },
            sqnr_db: (self.noise > 0.0 && self.signal > 0.0).then(|| 10.0 * (self.signal / self.noise).log10()),
            rel_frobenius: (self.signal > 0.0).then(|| (self.noise / self.signal).sqrt()),
            max_abs_diff: self.max_abs_diff,
            ref_mean_abs: self.sum_abs / n,
            ref_max_abs: self.max_abs,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_follow_their_formulae() {
        let mut diff = ActivationDiff::new(2);
        diff.push_rows(&[1.0, 0.0], &[1.0, 1.0]).expect("a row");
        diff.push_rows(&[0.0, 2.0], &[0.0, 2.0]).expect("a row");
        let row = diff.finish("m", Some(1), "q_proj");
        assert_eq!((row.n_tokens, row.mse, row.max_abs_diff, row.ref_max_abs), (2, 0.25, 1.0, 2.0));
        assert!((row.cosine - (0.5f64.sqrt() + 1.0) / 2.0).abs() < 1e-12);
        assert!((row.sqnr_db.expect("a ratio") - 10.0 * 5f64.log10()).abs() < 1e-12);
        assert!((row.rel_frobenius.expect("a ratio") - 0.2f64.sqrt()).abs() < 1e-12);
        assert_eq!(row.ref_mean_abs, 0.75);
    }

    #[test]
    fn equal_values_have_no_noise_and_nan_is_refused() {
        let mut diff = ActivationDiff::new(1);
        diff.push_rows(&[0.0, 3.0], &[0.0, 3.0]).expect("rows");
        assert!(diff.push_rows(&[f32::NAN], &[0.0]).is_err());
        assert!(diff.push_rows(&[1.0, 2.0], &[1.0]).is_err());
        assert!(ActivationDiff::new(2).push_rows(&[1.0; 3], &[1.0; 3]).is_err());
        let row = diff.finish("m", None, "norm");
        assert_eq!((row.mse, row.cosine, row.sqnr_db), (0.0, 1.0, None));
    }
}
