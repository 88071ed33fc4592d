//! A model's weights on the GPU: copied tile by tile from the file and quantized there.

use super::products::element;
use super::rows::device_error;
use crate::engine::spec::{LinearRole, LinearSpec, NormRole};
use crate::engine::weights::{UnreadWeight, WeightReader};
use crate::event::Progress;
use crate::inference::InferenceError;
use burn::tensor::{DType as BurnDType, Tensor};
use cubecl::client::Client;
use cubecl::server::Handle;
use labpipe_kernels::cube::quantize::Reading;
use labpipe_kernels::cube::{DeviceMatrix, FileMatrix, Form, MatrixLoader};
use labpipe_kernels::weight::HostWeight;

/// Linears that read the same input, stored as one matrix where their forms go together.
pub struct Projection {
    /// In the order of their rows.
    pub parts: Vec<DeviceMatrix>,
    /// Rows of each linear: a stacked matrix has several.
    pub widths: Vec<usize>,
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
    /// Loads every weight. Matrices are quantized on the device from their file's bytes, which pass through a tile of pinned memory;
    /// those that only the host can make are made there one projection at a time.
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
        let mut loading = Loading::new(client, reader, progress);
        let embedding = loading.matrix("embed_tokens", &[reader.unread_embedding()?])?;
        let mut blocks = Vec::with_capacity(spec.n_layers);
        for layer_idx in 0..spec.n_layers {
            blocks.push(loading.block(layer_idx)?);
            loading.loader.turn().map_err(device_error)?;
            progress.advance(1);
        }
        let final_norm = loading.row(reader.final_norm()?)?;
        let lm_head = match spec.tied_embeddings {
            true => embedding.clone(),
            false => loading.parts("lm_head", &["lm_head".to_owned()], &[spec.vocab_size], spec.hidden_size)?.remove(0),
        };
        loading.loader.settle().map_err(device_error)?;
        progress.advance(1);
        Ok(GpuWeights { embedding, blocks, final_norm, lm_head, stored_bytes: loading.stored_bytes })
    }
}

/// Weights on their way to the device.
pub struct Loading<'a> {
    pub client: &'a Client,
    pub loader: MatrixLoader<'a>,
    reader: &'a WeightReader<'a>,
    progress: &'a dyn Progress,
    stored_bytes: u64,
}

fn unsupported(module: &str) -> impl Fn(labpipe_kernels::SchemeError) -> InferenceError + '_ {
    move |error| InferenceError::Quantize { module: module.to_owned(), reason: error.to_string() }
}

/// Returns how the device keeps these matrices as one; nothing where the host makes one of them, or they do not go together.
fn common_form(module: &str, weights: &[UnreadWeight]) -> Result<Option<Form>, InferenceError> {
    let mut common = None;
    for weight in weights {
        let form = Form::of(weight.scheme.as_ref(), element(weight.base)).map_err(unsupported(module))?;
        if form.is_none() || common.is_some_and(|common| common != form) {
            return Ok(None);
        }
        common = Some(form);
    }
    let rows: Vec<usize> = weights.iter().map(|weight| weight.tensor.shape[0]).collect();
    let n_cols = weights.first().map_or(1, |weight| weight.tensor.shape[1]);
    Ok(common.flatten().filter(|form| form.stacks(&rows, n_cols)))
}

impl<'a> Loading<'a> {
    pub fn new(client: &'a Client, reader: &'a WeightReader<'a>, progress: &'a dyn Progress) -> Loading<'a> {
        Loading { client, loader: MatrixLoader::new(client), reader, progress, stored_bytes: 0 }
    }

    /// Makes a matrix of one weight on the device; `None` if only the host can make it.
    ///
    /// # Errors
    /// Whatever is wrong with the tensor or the scheme; `Cancelled`.
    pub fn by_device(&mut self, module: &str, weight: &UnreadWeight) -> Result<Option<DeviceMatrix>, InferenceError> {
        let weight = std::slice::from_ref(weight);
        if common_form(module, weight)?.is_none() {
            return Ok(None);
        }
        self.matrix(module, weight).map(Some)
    }

    /// Makes one matrix of weights that [`common_form`] holds to go together.
    ///
    /// # Errors
    /// Whatever is wrong with a tensor; `Cancelled`.
    pub fn matrix(&mut self, module: &str, weights: &[UnreadWeight]) -> Result<DeviceMatrix, InferenceError> {
        let form = common_form(module, weights)?.expect("the caller looked, or they are plain values of one matrix");
        let files: Vec<FileMatrix> = weights
            .iter()
            .map(|weight| FileMatrix {
                n_rows: weight.tensor.shape[0],
                bytes: weight.tensor.bytes.clone(),
                reading: Reading { source: element(weight.tensor.dtype), base: element(weight.base) },
            })
            .collect();
        let progress = self.progress;
        let look = |part: usize, at: usize, bytes: std::io::Result<&[u8]>| match progress.is_cancelled() {
            true => Err(InferenceError::Cancelled),
            false => weights[part].check(at, bytes.map_err(|error| weights[part].unreadable(&error))?),
        };
        let matrix = self.loader.load(form, weights[0].tensor.shape[1], &files, look)?;
        self.stored_bytes += matrix.device_bytes();
        Ok(matrix)
    }

    fn row(&mut self, row: Tensor<2>) -> Result<Handle, InferenceError> {
        let values = values(row)?;
        self.stored_bytes += 4 * values.len() as u64;
        Ok(self.client.create_from_slice(bytemuck_bytes(&values)))
    }

    /// Makes the matrices of linears that read the same input: one of all where they go together.
    fn parts(
        &mut self,
        module: &str,
        modules: &[String],
        rows: &[usize],
        n_in: usize,
    ) -> Result<Vec<DeviceMatrix>, InferenceError> {
        let unread = modules.iter().zip(rows).map(|(module, rows)| self.reader.unread_weight(module, &[*rows, n_in]));
        let Some(unread) = unread.collect::<Result<Option<Vec<UnreadWeight>>, _>>()? else {
            return self.parts_by_host(module, modules, rows, n_in);
        };
        if common_form(module, &unread)?.is_some() {
            return Ok(vec![self.matrix(module, &unread)?]);
        }
        for weight in &unread {
            if common_form(module, std::slice::from_ref(weight))?.is_none() {
                return self.parts_by_host(module, modules, rows, n_in);
            }
        }
        unread.iter().map(|weight| self.matrix(module, std::slice::from_ref(weight))).collect()
    }

    /// As [`parts`](Self::parts), of weights that the host holds in their stored form: those of files that are quantized already.
    fn parts_by_host(
        &mut self,
        module: &str,
        modules: &[String],
        rows: &[usize],
        n_in: usize,
    ) -> Result<Vec<DeviceMatrix>, InferenceError> {
        let weights: Vec<HostWeight> = modules
            .iter()
            .zip(rows)
            .map(|(module, rows)| self.reader.module_weight(module, *rows, n_in))
            .collect::<Result<_, _>>()?;
        let no_kernel = |error: labpipe_kernels::SchemeError| InferenceError::Quantize {
            module: module.to_owned(),
            reason: format!("no GPU kernel: {error}; run it on the CPU (--device cpu)"),
        };
        let stacked =
            DeviceMatrix::upload_stacked(self.client, &weights.iter().collect::<Vec<_>>()).map_err(no_kernel)?;
        let parts = match stacked {
            Some(matrix) => vec![matrix],
            None => weights
                .iter()
                .map(|weight| DeviceMatrix::upload(self.client, weight))
                .collect::<Result<_, _>>()
                .map_err(no_kernel)?,
        };
        self.stored_bytes += parts.iter().map(DeviceMatrix::device_bytes).sum::<u64>();
        Ok(parts)
    }

    fn projection(&mut self, layer_idx: usize, roles: &[LinearRole]) -> Result<Projection, InferenceError> {
        let all = self.reader.spec.block_linears();
        let linears: Vec<&LinearSpec> = roles
            .iter()
            .map(|role| all.iter().find(|linear| linear.role == *role).expect("a block's spec has this linear"))
            .collect();
        let modules: Vec<String> =
            linears.iter().map(|linear| format!("model.layers.{layer_idx}.{}", linear.name)).collect();
        let widths: Vec<usize> = linears.iter().map(|linear| linear.n_out).collect();
        let n_in = linears[0].n_in;
        let parts = self.parts(&modules[0], &modules, &widths, n_in)?;
        let bias = if linears.iter().any(|linear| linear.bias) {
            let mut all = Vec::new();
            for (linear, module) in linears.iter().zip(&modules) {
                match linear.bias {
                    true => all.extend(values(self.reader.bias(module, linear.n_out)?)?),
                    false => all.extend(std::iter::repeat_n(0.0f32, linear.n_out)),
                }
            }
            self.stored_bytes += 4 * all.len() as u64;
            Some(self.client.create_from_slice(bytemuck_bytes(&all)))
        } else {
            None
        };
        Ok(Projection { parts, n_out: widths.iter().sum(), widths, bias })
    }

    fn norm(&mut self, layer_idx: usize, role: NormRole) -> Result<Option<Handle>, InferenceError> {
        self.reader.block_norm(layer_idx, role, &mut 0)?.map(|norm| self.row(norm)).transpose()
    }

    fn qk_norm(&mut self, layer_idx: usize) -> Result<Option<QkNorm>, InferenceError> {
        let norm = |role| self.reader.block_norm(layer_idx, role, &mut 0);
        let (Some(q), Some(k)) = (norm(NormRole::Q)?, norm(NormRole::K)?) else { return Ok(None) };
        let (q_host, k_host) = (values(q.clone())?, values(k.clone())?);
        Ok(Some(QkNorm { q: self.row(q)?, k: self.row(k)?, q_host, k_host }))
    }

    fn block(&mut self, layer_idx: usize) -> Result<GpuBlock, InferenceError> {
        let block = &self.reader.spec.block;
        let qkv: &[LinearRole] =
            if block.fused_qkv { &[LinearRole::Qkv] } else { &[LinearRole::Q, LinearRole::K, LinearRole::V] };
        let gate_up: &[LinearRole] =
            if block.fused_gate_up { &[LinearRole::GateUp] } else { &[LinearRole::Gate, LinearRole::Up] };
        // Every block that the engine takes has these two; the others depend on the family.
        let required = |norm: Option<Handle>| norm.expect("the engine asked `fused_path_lacks`");
        Ok(GpuBlock {
            attn_norm: required(self.norm(layer_idx, NormRole::Attn)?),
            qkv: self.projection(layer_idx, qkv)?,
            qk_norm: self.qk_norm(layer_idx)?,
            o: self.projection(layer_idx, &[LinearRole::O])?,
            attn_out_norm: self.norm(layer_idx, NormRole::AttnOut)?,
            mlp_norm: required(self.norm(layer_idx, NormRole::Mlp)?),
            gate_up: self.projection(layer_idx, gate_up)?,
            down: self.projection(layer_idx, &[LinearRole::Down])?,
            mlp_out_norm: self.norm(layer_idx, NormRole::MlpOut)?,
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
