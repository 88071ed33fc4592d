//! What a tap is given of a pass beside the buffers: linears that are one product here, and norms that fused kernels do not store.

use super::pass::{Buffers, Passes};
use super::rows::Rows;
use super::weights::Projection;
use crate::engine::spec::NormRole;
use crate::engine::tap::{Source, Tap, Values};
use crate::inference::InferenceError;
use cubecl::server::Handle;
use labpipe_kernels::cube::Element;

impl Passes {
    /// Gives the tap the outputs of the norms on queries and keys. The kernel that rotates norms on its way and stores no such values,
    /// so they are computed here from the projections', in the same precision.
    pub fn tap_head_norms(&self, layer_idx: usize, buffers: &Buffers, tap: &mut Tap<'_>) -> Result<(), InferenceError> {
        let Some(norm) = &self.weights.blocks[layer_idx].qk_norm else { return Ok(()) };
        let (q, kv) = (self.spec.q_width(), self.spec.kv_width());
        for (role, weight, first, width) in [(NormRole::Q, &norm.q_host, 0, q), (NormRole::K, &norm.k_host, q, kv)] {
            let module = format!("model.layers.{layer_idx}.{}", self.spec.norm_name(role));
            if tap.wants(&module) {
                let rows = Rows {
                    client: self.client(),
                    handle: &buffers.qkv,
                    element: self.products.element,
                    n: buffers.n,
                    stride: q + 2 * kv,
                    first,
                    width,
                };
                let normed = Normed { values: norm_rows(rows.read()?, weight, self.spec.block.norm_eps), width };
                tap.output(&module, Some(layer_idx), "norm", &normed)?;
            }
        }
        Ok(())
    }

    /// As [`tap_head_norms`](Self::tap_head_norms), for a norm before the residual sum.
    pub fn tap_out_norm(
        &self,
        layer_idx: usize,
        role: NormRole,
        delta: &Rows<'_>,
        tap: &mut Tap<'_>,
    ) -> Result<(), InferenceError> {
        let block = &self.weights.blocks[layer_idx];
        let weight = if role == NormRole::MlpOut { &block.mlp_out_norm } else { &block.attn_out_norm };
        let module = format!("model.layers.{layer_idx}.{}", self.spec.norm_name(role));
        if let Some(weight) = weight.as_ref().filter(|_| tap.wants(&module)) {
            let weight = super::rows::read(self.client(), weight, Element::F32, self.spec.hidden_size)?;
            let normed = Normed {
                values: norm_rows(delta.read()?, &weight, self.spec.block.norm_eps),
                width: self.spec.hidden_size,
            };
            tap.output(&module, Some(layer_idx), "norm", &normed)?;
        }
        Ok(())
    }
}

/// Gives the tap the input and the outputs of linears that are one product here.
pub fn tap_projection(
    tap: &mut Tap<'_>,
    layer_idx: usize,
    names: &[&str],
    norm_name: &str,
    normed: &Rows<'_>,
    projection: &Projection,
    y: &Handle,
) -> Result<(), InferenceError> {
    let mut first = 0;
    for (leaf, width) in names.iter().zip(&projection.widths) {
        tap_columns(tap, layer_idx, leaf, norm_name, normed, y, [first, *width, projection.n_out])?;
        first += width;
    }
    Ok(())
}

pub fn tap_columns(
    tap: &mut Tap<'_>,
    layer_idx: usize,
    leaf: &str,
    norm_name: &str,
    normed: &Rows<'_>,
    y: &Handle,
    [first, width, stride]: [usize; 3],
) -> Result<(), InferenceError> {
    let module = format!("model.layers.{layer_idx}.{leaf}");
    let op = leaf.rsplit('.').next().unwrap_or(leaf);
    tap.shared_input(&module, Some(layer_idx), op, &Source { module: norm_name, op: "norm" }, normed)?;
    let rows = Rows { client: normed.client, handle: y, element: normed.element, n: normed.n, stride, first, width };
    tap.output(&module, Some(layer_idx), op, &rows)
}

/// Values that a fused kernel does not store.
struct Normed {
    values: Vec<f32>,
    width: usize,
}

impl Values for Normed {
    fn width(&self) -> usize {
        self.width
    }

    fn read(&self) -> Result<Vec<f32>, InferenceError> {
        Ok(self.values.clone())
    }
}

/// RMSNorm over rows as wide as `weight`.
fn norm_rows(mut values: Vec<f32>, weight: &[f32], eps: f64) -> Vec<f32> {
    for row in values.chunks_exact_mut(weight.len()) {
        let squares: f32 = row.iter().map(|value| value * value).sum();
        let scale = 1.0 / (squares / row.len() as f32 + eps as f32).sqrt();
        row.iter_mut().zip(weight).for_each(|(value, weight)| *value *= scale * weight);
    }
    values
}
