//! A model's weights on the GPU: read block by block from the memory map, packed, copied, and forgotten on the host.

use crate::engine::spec::ModelSpec;
use crate::engine::weights::{Block, GateUpLinears, Linear, QkvLinears, WeightReader};
use crate::event::Progress;
use crate::inference::InferenceError;
use burn::tensor::{DType as BurnDType, Tensor};
use cubecl::client::Client;
use cubecl::server::Handle;
use labpipe_kernels::cube::DeviceMatrix;
use labpipe_kernels::weight::HostWeight;

/// Linears that read the same input, stored as one matrix where their forms go together.
pub struct Projection {
    /// In the order of their rows.
    pub parts: Vec<DeviceMatrix>,
    /// Rows of each linear: a stacked matrix has several.
    pub widths: Vec<usize>,
    pub n_in: usize,
    pub n_out: usize,
    /// `[n_out]` f32.
    pub bias: Option<Handle>,
}

/// One decoder block; norms are f32 rows that are multiplied with.
pub struct GpuBlock {
    pub attn_norm: Handle,
    pub qkv: Projection,
    /// Weights of the norms on queries and keys, and the same on the host for captures.
    pub qk_norm: Option<QkNorm>,
    pub o: Projection,
    pub attn_out_norm: Option<Handle>,
    pub mlp_norm: Handle,
    pub gate_up: Projection,
    pub down: Projection,
    pub mlp_out_norm: Option<Handle>,
}

/// Norms on each head's query and key.
pub struct QkNorm {
    pub q: Handle,
    pub k: Handle,
    pub q_host: Vec<f32>, // [head_dim]
    pub k_host: Vec<f32>, // [head_dim]
}

/// All weights of a model.
pub struct GpuWeights {
    pub embedding: DeviceMatrix,
    pub blocks: Vec<GpuBlock>,
    pub final_norm: Handle,
    /// Shares the embedding's memory where the model ties them.
    pub lm_head: DeviceMatrix,
    /// Bytes of all parameters on the device, tied ones once.
    pub stored_bytes: u64,
}

impl GpuWeights {
    /// Loads every weight.
    ///
    /// # Errors
    /// Whatever is wrong with a tensor; `Cancelled`.
    pub fn load(
        client: &Client,
        reader: &WeightReader<'_>,
        progress: &dyn Progress,
    ) -> Result<GpuWeights, InferenceError> {
        let spec = reader.spec;
        progress.begin(Some(spec.n_layers as u64 + 1), "blocks");
        let mut uploader = Uploader { client, stored_bytes: 0 };
        let embedding = uploader.matrix("embed_tokens", &reader.embedding()?)?;
        let mut blocks = Vec::with_capacity(spec.n_layers);
        for layer_idx in 0..spec.n_layers {
            if progress.is_cancelled() {
                return Err(InferenceError::Cancelled);
            }
            blocks.push(uploader.block(layer_idx, reader.block(layer_idx, &mut 0)?, spec)?);
            progress.advance(1);
        }
        let final_norm = uploader.row(reader.final_norm()?)?;
        let lm_head = match reader.untied_head()? {
            None => embedding.clone(),
            Some(head) => uploader.matrix("lm_head", &head)?,
        };
        progress.advance(1);
        Ok(GpuWeights { embedding, blocks, final_norm, lm_head, stored_bytes: uploader.stored_bytes })
    }
}

struct Uploader<'a> {
    client: &'a Client,
    stored_bytes: u64,
}

fn unsupported(module: &str) -> impl Fn(labpipe_kernels::SchemeError) -> InferenceError + '_ {
    move |error| InferenceError::Quantize { module: module.to_owned(), reason: format!("no GPU kernel: {error}") }
}

impl Uploader<'_> {
    fn matrix(&mut self, module: &str, weight: &HostWeight) -> Result<DeviceMatrix, InferenceError> {
        let matrix = DeviceMatrix::upload(self.client, weight).map_err(unsupported(module))?;
        self.stored_bytes += matrix.device_bytes();
        Ok(matrix)
    }

    fn row(&mut self, row: Tensor<2>) -> Result<Handle, InferenceError> {
        let values = values(row)?;
        self.stored_bytes += 4 * values.len() as u64;
        Ok(self.client.create_from_slice(bytemuck_bytes(&values)))
    }

    fn projection(&mut self, module: &str, linears: &[&Linear]) -> Result<Projection, InferenceError> {
        let weights: Vec<&HostWeight> = linears.iter().map(|linear| linear.weight.as_ref()).collect();
        let stacked = if weights.len() > 1 {
            DeviceMatrix::upload_stacked(self.client, &weights).map_err(unsupported(module))?
        } else {
            None
        };
        let parts = match stacked {
            Some(matrix) => {
                self.stored_bytes += matrix.device_bytes();
                vec![matrix]
            }
            None => weights.iter().map(|weight| self.matrix(module, weight)).collect::<Result<_, _>>()?,
        };
        let widths: Vec<usize> = weights.iter().map(|weight| weight.n_rows()).collect();
        let bias = if linears.iter().any(|linear| linear.bias.is_some()) {
            let mut all = Vec::new();
            for (linear, width) in linears.iter().zip(&widths) {
                match &linear.bias {
                    Some(bias) => all.extend(values(bias.clone())?),
                    None => all.extend(std::iter::repeat_n(0.0f32, *width)),
                }
            }
            self.stored_bytes += 4 * all.len() as u64;
            Some(self.client.create_from_slice(bytemuck_bytes(&all)))
        } else {
            None
        };
        Ok(Projection { parts, n_in: weights[0].n_cols(), n_out: widths.iter().sum(), widths, bias })
    }

    fn block(&mut self, layer_idx: usize, block: Block, spec: &ModelSpec) -> Result<GpuBlock, InferenceError> {
        let name = |leaf: &str| format!("model.layers.{layer_idx}.{leaf}");
        let qkv = match &block.qkv {
            QkvLinears::Apart { q, k, v } => self.projection(&name("self_attn.q_proj"), &[q, k, v])?,
            QkvLinears::Fused(all) => self.projection(&name("self_attn.qkv_proj"), &[all])?,
        };
        let gate_up = match &block.gate_up {
            GateUpLinears::Apart { gate, up } => self.projection(&name("mlp.gate_proj"), &[gate, up])?,
            GateUpLinears::Fused(both) => self.projection(&name("mlp.gate_up_proj"), &[both])?,
        };
        let qk_norm = match (block.q_norm, block.k_norm) {
            (Some(q), Some(k)) if spec.block.qk_norm => {
                let (q_host, k_host) = (values(q.clone())?, values(k.clone())?);
                Some(QkNorm { q: self.row(q)?, k: self.row(k)?, q_host, k_host })
            }
            _ => None,
        };
        Ok(GpuBlock {
            attn_norm: self.row(block.attn_norm)?,
            qkv,
            qk_norm,
            o: self.projection(&name("self_attn.o_proj"), &[&block.o])?,
            attn_out_norm: block.attn_out_norm.map(|norm| self.row(norm)).transpose()?,
            mlp_norm: self.row(block.mlp_norm)?,
            gate_up,
            down: self.projection(&name("mlp.down_proj"), &[&block.down])?,
            mlp_out_norm: block.mlp_out_norm.map(|norm| self.row(norm)).transpose()?,
        })
    }
}

fn values(row: Tensor<2>) -> Result<Vec<f32>, InferenceError> {
    row.into_data_dtype(BurnDType::F32)
        .try_into_vec::<f32>()
        .map_err(|error| InferenceError::Unsupported(format!("read a norm's weights: {error:?}")))
}

/// Returns values as the bytes that a buffer holds.
pub fn bytemuck_bytes(values: &[f32]) -> &[u8] {
    cubecl::prelude::CubeElement::as_bytes(values)
}
