//! A model's weights as a step wants them: linears shared with the executor, small vectors copied out of tensors.

use super::Unsupported;
use crate::engine::forward::Executor;
use crate::engine::score::values;
use crate::engine::spec::{Activation, ModelSpec};
use crate::engine::weights::{Block, GateUpLinears, Linear, QkvLinears};
use crate::inference::InferenceError;
use crate::units::DType;
use burn::tensor::Tensor;
use labpipe_kernels::burn_ext::StoredWeight;
use labpipe_kernels::token::Gate;
use labpipe_kernels::weight::HostWeight;
use std::sync::Arc;

/// Linears that take the same input; their rows lie one after another in the output.
pub struct Projection {
    parts: Vec<OnHost>,
    bias: Option<Vec<f32>>, // [n_rows]
    n_rows: usize,
    n_cols: usize,
}

/// A weight that the host holds, shared with the executor.
#[derive(Clone)]
pub struct OnHost(Arc<StoredWeight>);

impl OnHost {
    fn new(weight: &Arc<StoredWeight>) -> OnHost {
        OnHost(Arc::clone(weight))
    }
}

impl std::ops::Deref for OnHost {
    type Target = HostWeight;

    fn deref(&self) -> &HostWeight {
        self.0.as_host().expect("`supported` found every weight on the host")
    }
}

impl Projection {
    fn new(linears: &[&Linear]) -> Result<Projection, InferenceError> {
        let parts: Vec<OnHost> = linears.iter().map(|linear| OnHost::new(&linear.weight)).collect();
        let n_rows = parts.iter().map(|part| part.n_rows()).sum();
        let bias = if linears.iter().any(|linear| linear.bias.is_some()) {
            let mut whole = Vec::with_capacity(n_rows);
            for linear in linears {
                match &linear.bias {
                    Some(bias) => whole.extend(values(bias.clone())?),
                    None => whole.resize(whole.len() + linear.weight.n_rows(), 0.0),
                }
            }
            Some(whole)
        } else {
            None
        };
        let n_cols = parts.first().map_or(0, |part| part.n_cols());
        Ok(Projection { parts, bias, n_rows, n_cols })
    }

    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Number of inputs.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Writes `y[i] = Σ_k w[first_row + i, k]·x[k] + b[first_row + i]`.
    pub fn rows(&self, first_row: usize, x: &[f32], y: &mut [f32]) {
        let (mut part_first, mut rest) = (0, &mut *y);
        for part in &self.parts {
            let part_end = part_first + part.n_rows();
            let row = first_row.max(part_first);
            if row < part_end && !rest.is_empty() {
                let n = rest.len().min(part_end - row);
                let (these, after) = rest.split_at_mut(n);
                part.matvec_rows(row - part_first, x, these);
                rest = after;
            }
            part_first = part_end;
        }
        if let Some(bias) = &self.bias {
            y.iter_mut().zip(&bias[first_row..]).for_each(|(y, bias)| *y += bias);
        }
    }
}

/// One decoder block.
pub struct HostBlock {
    pub attn_norm: Option<Vec<f32>>,     // [hidden]
    pub qkv: Projection,                 // [q_width + 2 · kv_width, hidden]
    pub q_norm: Option<Vec<f32>>,        // [head_dim] or [q_width]
    pub k_norm: Option<Vec<f32>>,        // [head_dim] or [kv_width]
    pub o: Projection,                   // [hidden, q_width]
    pub attn_out_norm: Option<Vec<f32>>, // [hidden]
    pub mlp_norm: Option<Vec<f32>>,      // [hidden]
    pub gate_up: Projection,             // [2 · ffn, hidden]
    pub down: Projection,                // [hidden, ffn]
    pub mlp_out_norm: Option<Vec<f32>>,  // [hidden]
}

/// All weights of a model.
pub struct HostWeights {
    pub embedding: OnHost, // [vocab, hidden]
    pub blocks: Vec<HostBlock>,
    pub final_norm: Vec<f32>, // [hidden]
    pub lm_head: Projection,  // [vocab, hidden]
    pub gate: Gate,
}

impl HostWeights {
    /// Takes the executor's weights, or returns why a step can't compute this model.
    ///
    /// # Errors
    /// Where a tensor can't be read.
    pub fn new(executor: &Executor) -> Result<Result<HostWeights, Unsupported>, InferenceError> {
        let gate = match supported(&executor.spec, executor) {
            Ok(gate) => gate,
            Err(reason) => return Ok(Err(reason)),
        };
        let weights = &executor.weights;
        let blocks = weights.blocks.iter().map(block).collect::<Result<Vec<_>, _>>()?;
        Ok(Ok(HostWeights {
            embedding: OnHost::new(&weights.embedding),
            blocks,
            final_norm: values(weights.final_norm.clone())?,
            lm_head: Projection::new(&[&weights.lm_head])?,
            gate,
        }))
    }
}

fn supported(spec: &ModelSpec, executor: &Executor) -> Result<Gate, Unsupported> {
    if executor.compute != DType::F32 {
        return Err(Unsupported::ComputeDtype);
    }
    let linears = executor.weights.blocks.iter().flat_map(linears).chain([&executor.weights.lm_head]);
    for linear in linears {
        match linear.weight.as_host() {
            None => return Err(Unsupported::OnDevice),
            Some(weight) if weight.has_own_product() => return Err(Unsupported::QuantizedActivations),
            Some(_) => {}
        }
    }
    match spec.block.activation {
        Activation::Silu => Ok(Gate::Silu),
        Activation::GeluTanh => Ok(Gate::GeluTanh),
        Activation::Gelu => Err(Unsupported::ExactGelu),
    }
}

fn qkv(block: &Block) -> Vec<&Linear> {
    match &block.qkv {
        QkvLinears::Apart { q, k, v } => vec![q, k, v],
        QkvLinears::Fused(linear) => vec![linear],
    }
}

fn gate_up(block: &Block) -> Vec<&Linear> {
    match &block.gate_up {
        GateUpLinears::Apart { gate, up } => vec![gate, up],
        GateUpLinears::Fused(linear) => vec![linear],
    }
}

fn linears(block: &Block) -> Vec<&Linear> {
    [qkv(block), vec![&block.o], gate_up(block), vec![&block.down]].concat()
}

fn block(block: &Block) -> Result<HostBlock, InferenceError> {
    let maybe = |norm: &Option<Tensor<2>>| norm.clone().map(values).transpose();
    Ok(HostBlock {
        attn_norm: maybe(&block.attn_norm)?,
        qkv: Projection::new(&qkv(block))?,
        q_norm: maybe(&block.q_norm)?,
        k_norm: maybe(&block.k_norm)?,
        o: Projection::new(&[&block.o])?,
        attn_out_norm: maybe(&block.attn_out_norm)?,
        mlp_norm: maybe(&block.mlp_norm)?,
        gate_up: Projection::new(&gate_up(block))?,
        down: Projection::new(&[&block.down])?,
        mlp_out_norm: maybe(&block.mlp_out_norm)?,
    })
}
