//! What a diff shows: how far each module's output is from the reference's, by operation and by layer.
//!
//! In cumulative mode that distance is the effect of all errors up to the module; it is no sensitivity, and does not say which modules
//! to keep in a higher precision.

use crate::artifact::ModuleDiff;
use crate::metrics::percentile;
use std::cmp::Ordering;
use std::collections::BTreeMap;

/// Modules of one operation, or one layer, summed up.
#[derive(Debug, Clone, PartialEq)]
pub struct Group<'a> {
    pub name: String,
    pub n_modules: usize,
    /// Median over modules with an error; None where none has any.
    pub sqnr_db_median: Option<f64>,
    pub cosine_mean: f64,
    pub mse_max: f64,
    /// The module whose output is furthest from the reference's.
    pub furthest: &'a ModuleDiff,
}

/// Returns true for the operations that hold a matrix, which are what quantization touches.
pub fn is_linear(op: &str) -> bool {
    op.ends_with("proj") || op == "lm_head" || op == "linear"
}

/// Returns linears (all modules where there are none), the one whose output is furthest from the reference's first: lowest SQNR, then
/// lowest cosine. Exact ones stand last.
pub fn furthest_first(rows: &[ModuleDiff]) -> Vec<&ModuleDiff> {
    let has_linears = rows.iter().any(|row| is_linear(&row.op));
    let mut ranked: Vec<&ModuleDiff> = rows.iter().filter(|row| !has_linears || is_linear(&row.op)).collect();
    ranked.sort_by(|a, b| by_distance(a, b));
    ranked
}

fn by_distance(a: &ModuleDiff, b: &ModuleDiff) -> Ordering {
    let sqnr = |row: &ModuleDiff| match row.sqnr_db.filter(|db| !db.is_nan()) {
        Some(db) => db,
        None if row.mse == 0.0 => f64::INFINITY,
        // Nothing is left of the signal, or of the numbers.
        None => f64::NEG_INFINITY,
    };
    let cosine = |row: &ModuleDiff| if row.cosine.is_nan() { f64::NEG_INFINITY } else { row.cosine };
    sqnr(a).total_cmp(&sqnr(b)).then(cosine(a).total_cmp(&cosine(b)))
}

/// Returns the operations in order of first appearance.
pub fn by_op(rows: &[ModuleDiff]) -> Vec<Group<'_>> {
    let mut ops: Vec<&str> = Vec::new();
    for row in rows {
        if !ops.contains(&row.op.as_str()) {
            ops.push(&row.op);
        }
    }
    let of_op = |op: &str| rows.iter().filter(|row| row.op == op).collect::<Vec<_>>();
    ops.iter().filter_map(|op| group((*op).to_owned(), of_op(op))).collect()
}

/// Returns the layers in order; modules outside of them are left out.
pub fn by_layer(rows: &[ModuleDiff]) -> Vec<Group<'_>> {
    let mut layers: BTreeMap<usize, Vec<&ModuleDiff>> = BTreeMap::new();
    for row in rows {
        if let Some(layer_idx) = row.layer_idx {
            layers.entry(layer_idx).or_default().push(row);
        }
    }
    layers.into_iter().filter_map(|(layer_idx, rows)| group(layer_idx.to_string(), rows)).collect()
}

fn group(name: String, rows: Vec<&ModuleDiff>) -> Option<Group<'_>> {
    let furthest = *rows.iter().min_by(|a, b| by_distance(a, b))?;
    let mut sqnrs: Vec<f64> = rows.iter().filter_map(|row| row.sqnr_db).collect();
    sqnrs.sort_by(f64::total_cmp);
    Some(Group {
        name,
        n_modules: rows.len(),
        sqnr_db_median: (!sqnrs.is_empty()).then(|| percentile(&sqnrs, 50.0)),
        cosine_mean: rows.iter().map(|row| row.cosine).sum::<f64>() / rows.len() as f64,
        // NaN is not passed over: f64::max would.
        mse_max: rows.iter().map(|row| row.mse).fold(0.0, |max, mse| if mse.is_nan() || mse > max { mse } else { max }),
        furthest,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::testing::module_diffs;

    #[test]
    fn linears_are_ranked_by_sqnr_and_exact_ones_stand_last() {
        let mut rows = module_diffs(2);
        rows[3].sqnr_db = None;
        rows[3].mse = 0.0;
        let ranked = furthest_first(&rows);
        assert!(ranked.iter().all(|row| is_linear(&row.op)));
        assert!(ranked.windows(2).all(|pair| by_distance(pair[0], pair[1]) != Ordering::Greater));
        assert_eq!(ranked.last().unwrap().module, rows[3].module);
    }

    #[test]
    fn modules_without_numbers_are_the_furthest_first() {
        let mut rows = module_diffs(2);
        let lost = rows.iter().position(|row| row.op == "down_proj").unwrap();
        (rows[lost].mse, rows[lost].cosine, rows[lost].sqnr_db) = (f64::NAN, f64::NAN, Some(f64::NAN));
        assert_eq!(furthest_first(&rows)[0].module, rows[lost].module);
        let layers = by_layer(&rows);
        assert!(layers[0].mse_max.is_nan() && layers[0].furthest.module == rows[lost].module);
    }

    #[test]
    fn groups_cover_every_module_once() {
        let rows = module_diffs(3);
        assert_eq!(by_op(&rows).iter().map(|group| group.n_modules).sum::<usize>(), rows.len());
        let layers = by_layer(&rows);
        assert_eq!(layers.iter().map(|group| group.name.as_str()).collect::<Vec<_>>(), ["0", "1", "2"]);
        assert!(layers.iter().all(|group| group.furthest.layer_idx.is_some()));
    }
}
