//! What quantizing a model's linears costs and loses, one after the other. The host measures by packing; a device may do better.

use super::weights::{WeightReader, pack};
use crate::artifact::QuantizedModule;
use crate::event::{Level, Progress};
use crate::inference::InferenceError;
use crate::units::DType;
use labpipe_kernels::weight::HostWeight;
use labpipe_kernels::{SchemeSpec, reconstruction_error};
use std::collections::BTreeMap;

/// A linear that a config quantizes.
pub struct Candidate<'a> {
    /// `model.layers.4.mlp.down_proj`.
    pub module: &'a str,
    pub n_out: usize,
    pub n_in: usize,
    pub scheme: &'a SchemeSpec,
}

impl Candidate<'_> {
    /// Returns the error of a linear that is not quantized, for `reason`.
    pub fn refused(&self, reason: impl std::fmt::Display) -> InferenceError {
        InferenceError::Quantize { module: self.module.to_owned(), reason: reason.to_string() }
    }
}

/// What a linear's packed form is.
pub struct Measured {
    /// With all its settings.
    pub scheme: SchemeSpec,
    pub bytes: u64,
    pub mse: f64,
    pub sqnr_db: Option<f64>,
}

/// Below this a quarter of a decoded weight's energy is noise. Every scheme reaches 15 dB on Gaussian weights whose magnitudes it can
/// represent, and falls to 0 dB where it saturates or rounds all of them to 0.
const MIN_SQNR_DB: f64 = 6.0;

/// Names shown in a warning.
const MAX_NAMED: usize = 3;

/// Tells of each linear what it is stored as; what `measure` finds of those that are quantized. Linears that their scheme cannot
/// represent are named in a warning.
///
/// # Errors
/// Whatever is wrong with a tensor or a scheme; `Cancelled`.
pub fn survey(
    reader: &WeightReader<'_>,
    progress: &dyn Progress,
    measure: &mut dyn FnMut(&Candidate<'_>) -> Result<Measured, InferenceError>,
    each: &mut dyn FnMut(QuantizedModule),
) -> Result<(), InferenceError> {
    let linears = reader.spec.linears();
    progress.begin(Some(linears.len() as u64), "modules");
    let mut lost = Lost::default();
    for (module, [n_out, n_in]) in &linears {
        if progress.is_cancelled() {
            return Err(InferenceError::Cancelled);
        }
        let is_tied_head = module == "lm_head" && reader.spec.tied_embeddings;
        let scheme = reader.recipe.quantization.as_ref().and_then(|config| config.scheme_for(module));
        each(match scheme.filter(|_| !is_tied_head) {
            Some(scheme) => {
                let candidate = Candidate { module, n_out: *n_out, n_in: *n_in, scheme };
                let measured = measure(&candidate)?;
                lost.note(&measured, module);
                quantized(&candidate, measured)
            }
            None => {
                let tensor = if is_tied_head { reader.embedding_name().to_owned() } else { format!("{module}.weight") };
                kept(reader, module, &tensor, (n_out * n_in) as u64)
            }
        });
        progress.advance(1);
    }
    lost.warnings().iter().for_each(|warning| progress.note(Level::Warning, warning));
    Ok(())
}

/// Linears whose packed form is not close to them, by scheme.
#[derive(Default)]
struct Lost {
    /// Decoded values, or their difference, overflow.
    infinite: BTreeMap<String, Vec<String>>,
    /// Most of the weight is noise.
    noisy: BTreeMap<String, Vec<String>>,
}

impl Lost {
    fn note(&mut self, measured: &Measured, module: &str) {
        let is_finite = measured.mse.is_finite() && measured.sqnr_db.is_none_or(f64::is_finite);
        let kind = match measured.sqnr_db {
            _ if !is_finite => &mut self.infinite,
            Some(sqnr_db) if sqnr_db < MIN_SQNR_DB => &mut self.noisy,
            _ => return,
        };
        kind.entry(measured.scheme.scheme.clone()).or_default().push(module.to_owned());
    }

    fn warnings(&self) -> Vec<String> {
        let infinite = "cannot represent the weights of";
        let infinite_why =
            "decoded, they or their error are not finite, so that weight_mse or weight_sqnr_db is no number";
        let noisy = "loses much of the weights of";
        let noisy_why = format!("decoded, their signal-to-noise ratio is below {MIN_SQNR_DB} dB");
        let kinds = [(&self.infinite, infinite, infinite_why), (&self.noisy, noisy, noisy_why.as_str())];
        let warning = |(scheme, modules): (&String, &Vec<String>), what: &str, why: &str| {
            let more = match modules.len().saturating_sub(MAX_NAMED) {
                0 => String::new(),
                n => format!(" and {n} more"),
            };
            let named = modules[..modules.len().min(MAX_NAMED)].join(", ");
            format!(
                "{scheme} {what} {named}{more}: {why}; their magnitudes are too large, too small or too far apart for it (list them in \
                 keep, or take another scheme)"
            )
        };
        kinds.iter().flat_map(|(lost, what, why)| lost.iter().map(|entry| warning(entry, what, why))).collect()
    }
}

/// Measures a linear by packing it.
///
/// # Errors
/// Whatever is wrong with its tensor or its scheme.
pub fn on_host(reader: &WeightReader<'_>, candidate: &Candidate<'_>) -> Result<Measured, InferenceError> {
    let Candidate { module, n_out, n_in, scheme } = *candidate;
    let values = reader.base_values(&format!("{module}.weight"), &[n_out, n_in])?;
    let weight = pack(module, scheme, &values, n_out, n_in)?;
    let bytes = weight.stored_bytes();
    let HostWeight::Packed(packed) = weight else {
        return Err(candidate.refused("it was not packed"));
    };
    let (mse, sqnr_db) = reconstruction_error(&values, &packed);
    Ok(Measured { scheme: packed.spec, bytes, mse, sqnr_db })
}

fn quantized(candidate: &Candidate<'_>, measured: Measured) -> QuantizedModule {
    let n_params = (candidate.n_out * candidate.n_in) as u64;
    QuantizedModule {
        module: candidate.module.to_owned(),
        scheme: measured.scheme.scheme,
        block_size: measured.scheme.block_size,
        double_quant: measured.scheme.double_quant,
        n_params,
        bits_per_weight: 8.0 * measured.bytes as f64 / n_params as f64,
        bytes: measured.bytes,
        weight_mse: measured.mse,
        weight_sqnr_db: measured.sqnr_db,
    }
}

fn kept(reader: &WeightReader<'_>, module: &str, tensor: &str, n_params: u64) -> QuantizedModule {
    let stored = reader.checkpoint.dtype_of(tensor).unwrap_or(DType::F32);
    let dtype = reader.recipe.dtype.unwrap_or(stored);
    QuantizedModule {
        module: module.to_owned(),
        scheme: dtype.name().to_owned(),
        block_size: None,
        double_quant: false,
        n_params,
        bits_per_weight: 8.0 * dtype.size_bytes() as f64,
        bytes: n_params * dtype.size_bytes() as u64,
        weight_mse: 0.0,
        weight_sqnr_db: None,
    }
}
