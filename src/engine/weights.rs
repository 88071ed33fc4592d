//! A model's weights on the device: linears in stored form, norms and biases as tensors.

#[cfg(any(feature = "cuda", feature = "wgpu"))]
use super::checkpoint::first_beyond;
use super::checkpoint::{Checkpoint, EMBEDDING, HEAD, StoredTensor, dense_type, first_not_finite, to_dtype, to_f32};
use super::placing::Placing;
use super::spec::{LinearRole, ModelSpec, NormRole};
use crate::event::Progress;
use crate::inference::{InferenceError, ModelRecipe};
use crate::quantization::QuantizationConfig;
use crate::units::DType;
use burn::tensor::{Device, Tensor, TensorData};
use labpipe_kernels::burn_ext::StoredWeight;
use labpipe_kernels::weight::{DenseWeight, HostWeight, SharedBytes};
use labpipe_kernels::{SchemeSpec, schemes};
use std::sync::Arc;

/// A linear layer.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Arc<StoredWeight>,
    /// `[1, out]`.
    pub bias: Option<Tensor<2>>,
}

/// The projections to queries, keys and values.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one a block, and most are of the larger kind")]
pub enum QkvLinears {
    Apart {
        q: Linear,
        k: Linear,
        v: Linear,
    },
    /// Rows of all query heads, then of all key heads, then of all value heads.
    Fused(Linear),
}

/// The projections that the MLP's product is made of.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one a block, and most are of the larger kind")]
pub enum GateUpLinears {
    Apart {
        gate: Linear,
        up: Linear,
    },
    /// Rows of the gate, then of the up projection.
    Fused(Linear),
}

/// One decoder block. Norms' weights are what to multiply by: where the family stores w for 1 + w, the 1 is in them.
#[derive(Debug)]
pub struct Block {
    pub attn_norm: Option<Tensor<2>>, // [1, hidden]
    pub qkv: QkvLinears,
    pub q_norm: Option<Tensor<2>>, // [1, head_dim] or [1, q_width]
    pub k_norm: Option<Tensor<2>>, // [1, head_dim] or [1, kv_width]
    pub o: Linear,
    pub attn_out_norm: Option<Tensor<2>>, // [1, hidden]
    pub mlp_norm: Option<Tensor<2>>,      // [1, hidden]
    pub gate_up: GateUpLinears,
    pub down: Linear,
    pub mlp_out_norm: Option<Tensor<2>>, // [1, hidden]
}

/// All weights of a model.
#[derive(Debug)]
pub struct Weights {
    /// `[vocab, hidden]`, never quantized.
    pub embedding: Arc<StoredWeight>,
    pub blocks: Vec<Block>,
    pub final_norm: Tensor<2>, // [1, hidden]
    /// Shares the embedding's memory where the model ties them.
    pub lm_head: Linear,
    /// Bytes of all parameters as stored, tied ones once.
    pub stored_bytes: u64,
}

impl Weights {
    /// Makes the pages of weights that are mapped from files resident, so that none is first met in a timed region.
    pub fn touch_pages(&self) {
        let linears = self.blocks.iter().flat_map(Block::linears).chain([&self.lm_head]);
        for weight in linears.map(|linear| &linear.weight).chain([&self.embedding]) {
            if let Some(weight) = weight.as_host() {
                weight.touch_pages();
            }
        }
    }
}

impl Block {
    /// Returns the block's linears.
    pub fn linears(&self) -> Vec<&Linear> {
        let mut linears = match &self.qkv {
            QkvLinears::Apart { q, k, v } => vec![q, k, v],
            QkvLinears::Fused(linear) => vec![linear],
        };
        linears.push(&self.o);
        match &self.gate_up {
            GateUpLinears::Apart { gate, up } => linears.extend([gate, up]),
            GateUpLinears::Fused(linear) => linears.push(linear),
        }
        linears.push(&self.down);
        linears
    }
}

/// Reads weights as a recipe wants them.
pub struct WeightReader<'a> {
    pub checkpoint: &'a Checkpoint,
    pub spec: &'a ModelSpec,
    pub recipe: &'a ModelRecipe,
    pub device: &'a Device,
}

impl WeightReader<'_> {
    /// Loads every weight, quantizing where the recipe says so.
    ///
    /// # Errors
    /// Whatever is wrong with a tensor; `Cancelled`.
    pub fn read_all(&self, placing: &mut dyn Placing, progress: &dyn Progress) -> Result<Weights, InferenceError> {
        let spec = self.spec;
        progress.begin(Some(spec.n_layers as u64 + 1), "blocks");
        let mut stored_bytes = 0u64;
        let embedding = Arc::new(placing.embedding(self)?);
        stored_bytes += embedding.stored_bytes();
        let mut blocks = Vec::with_capacity(spec.n_layers);
        for layer_idx in 0..spec.n_layers {
            if progress.is_cancelled() {
                return Err(InferenceError::Cancelled);
            }
            blocks.push(self.block(layer_idx, placing, &mut stored_bytes)?);
            placing.turn()?;
            progress.advance(1);
        }
        let final_norm = self.norm("model.norm.weight", spec.hidden_size, &mut stored_bytes)?;
        let lm_head = if spec.tied_embeddings {
            Linear { weight: Arc::clone(&embedding), bias: None }
        } else {
            let head = (spec.vocab_size, spec.hidden_size);
            self.linear("lm_head", head, false, placing, &mut stored_bytes)?
        };
        placing.settle()?;
        progress.advance(1);
        Ok(Weights { embedding, blocks, final_norm, lm_head, stored_bytes })
    }

    /// Loads one decoder block.
    ///
    /// # Errors
    /// Whatever is wrong with a tensor.
    pub fn block(
        &self,
        layer_idx: usize,
        placing: &mut dyn Placing,
        stored_bytes: &mut u64,
    ) -> Result<Block, InferenceError> {
        let prefix = format!("model.layers.{layer_idx}");
        let linear_specs = self.spec.block_linears();
        let norm = |role| self.block_norm(layer_idx, role, stored_bytes);
        let roles = [NormRole::Attn, NormRole::Q, NormRole::K, NormRole::AttnOut, NormRole::Mlp, NormRole::MlpOut];
        let [attn_norm, q_norm, k_norm, attn_out_norm, mlp_norm, mlp_out_norm] = roles.map(norm);
        let mut read = |role| {
            let spec = linear_specs.iter().find(|linear| linear.role == role).expect("a block's spec has this linear");
            let shape = (spec.n_out, spec.n_in);
            self.linear(&format!("{prefix}.{}", spec.name), shape, spec.bias, placing, stored_bytes)
        };
        let qkv = if self.spec.block.fused_qkv {
            QkvLinears::Fused(read(LinearRole::Qkv)?)
        } else {
            QkvLinears::Apart { q: read(LinearRole::Q)?, k: read(LinearRole::K)?, v: read(LinearRole::V)? }
        };
        let o = read(LinearRole::O)?;
        let gate_up = if self.spec.block.fused_gate_up {
            GateUpLinears::Fused(read(LinearRole::GateUp)?)
        } else {
            GateUpLinears::Apart { gate: read(LinearRole::Gate)?, up: read(LinearRole::Up)? }
        };
        let down = read(LinearRole::Down)?;
        Ok(Block {
            attn_norm: attn_norm?,
            qkv,
            q_norm: q_norm?,
            k_norm: k_norm?,
            o,
            attn_out_norm: attn_out_norm?,
            mlp_norm: mlp_norm?,
            gate_up,
            down,
            mlp_out_norm: mlp_out_norm?,
        })
    }

    /// Loads one norm of a block, `[1, width]`, where the family has it.
    ///
    /// # Errors
    /// Whatever is wrong with the tensor.
    pub fn block_norm(
        &self,
        layer_idx: usize,
        role: NormRole,
        stored_bytes: &mut u64,
    ) -> Result<Option<Tensor<2>>, InferenceError> {
        let norms = self.spec.block_norms();
        let Some(spec) = norms.iter().find(|norm| norm.role == role) else { return Ok(None) };
        self.norm(&format!("model.layers.{layer_idx}.{}.weight", spec.name), spec.width, stored_bytes).map(Some)
    }

    /// Loads a linear's bias, `[1, n_out]`.
    ///
    /// # Errors
    /// Whatever is wrong with the tensor.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    pub fn bias(&self, module: &str, n_out: usize) -> Result<Tensor<2>, InferenceError> {
        self.row(&format!("{module}.bias"), n_out, &mut 0)
    }

    /// Finds the embedding, `[vocab, hidden]`.
    ///
    /// # Errors
    /// Whatever is wrong with the tensor, its values apart.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    pub fn unread_embedding(&self) -> Result<UnreadWeight, InferenceError> {
        let name = self.embedding_name();
        let tensor = self.checkpoint.unread(name, &[self.spec.vocab_size, self.spec.hidden_size])?;
        Ok(UnreadWeight { name: name.to_owned(), base: self.base_dtype(tensor.dtype), tensor, scheme: None })
    }

    /// Finds a linear's weight; nothing where it is stored packed.
    ///
    /// # Errors
    /// Whatever is wrong with the tensor, its values apart.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    pub fn unread_weight(&self, module: &str, shape: &[usize; 2]) -> Result<Option<UnreadWeight>, InferenceError> {
        let name = format!("{module}.weight");
        if self.checkpoint.is_packed(&name) {
            return Ok(None);
        }
        let tensor = self.checkpoint.unread(&name, shape)?;
        let scheme = self.recipe.quantization.as_ref().and_then(|config| config.scheme_for(module)).cloned();
        Ok(Some(UnreadWeight { name, base: self.base_dtype(tensor.dtype), tensor, scheme }))
    }

    /// Loads the norm before the head, `[1, hidden]`.
    ///
    /// # Errors
    /// Whatever is wrong with the tensor.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    pub fn final_norm(&self) -> Result<Tensor<2>, InferenceError> {
        self.norm("model.norm.weight", self.spec.hidden_size, &mut 0)
    }

    /// Returns the tensor that holds the embedding: with tied weights a file may keep it under either name.
    pub fn embedding_name(&self) -> &'static str {
        if self.spec.tied_embeddings && !self.checkpoint.contains(EMBEDDING) && self.checkpoint.contains(HEAD) {
            HEAD
        } else {
            EMBEDDING
        }
    }

    /// Returns the type in which a tensor that is not quantized is kept.
    fn base_dtype(&self, stored: DType) -> DType {
        self.recipe.dtype.unwrap_or(stored)
    }

    fn linear(
        &self,
        module: &str,
        (n_out, n_in): (usize, usize),
        has_bias: bool,
        placing: &mut dyn Placing,
        stored_bytes: &mut u64,
    ) -> Result<Linear, InferenceError> {
        let weight = placing.linear(self, module, n_out, n_in)?;
        *stored_bytes += weight.stored_bytes();
        let bias = has_bias.then(|| self.row(&format!("{module}.bias"), n_out, stored_bytes)).transpose()?;
        Ok(Linear { weight: Arc::new(weight), bias })
    }

    /// Loads one linear's weight, packed if the recipe quantizes it.
    ///
    /// # Errors
    /// Whatever is wrong with the tensor or the scheme.
    pub fn module_weight(&self, module: &str, n_out: usize, n_in: usize) -> Result<HostWeight, InferenceError> {
        let name = format!("{module}.weight");
        if let Some(packed) = self.checkpoint.packed(&name, &[n_out, n_in])? {
            return Ok(HostWeight::Packed(packed));
        }
        match self.recipe.quantization.as_ref().and_then(|config| config.scheme_for(module)) {
            None => self.dense(&name, &[n_out, n_in]),
            Some(scheme) => {
                let values = self.base_values(&name, &[n_out, n_in])?;
                pack(module, scheme, &values, n_out, n_in)
            }
        }
    }

    /// Returns a tensor's values rounded to the base dtype: what a quantizer is given.
    pub fn base_values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, InferenceError> {
        let tensor = self.checkpoint.tensor(name, shape)?;
        let dtype = self.base_dtype(tensor.dtype);
        let values = to_f32(tensor.dtype, tensor.bytes.as_slice());
        if dtype == tensor.dtype || dtype == DType::F32 {
            return Ok(values);
        }
        let rounded = to_dtype(&values, dtype);
        check_range(name, dtype, rounded.as_slice(), &values)?;
        Ok(to_f32(dtype, rounded.as_slice()))
    }

    /// Returns a tensor of any shape in the type in which it is kept when it is not quantized.
    ///
    /// # Errors
    /// Whatever is wrong with the tensor.
    pub fn stored_bytes(&self, name: &str, shape: &[usize]) -> Result<SharedBytes, InferenceError> {
        let tensor = self.checkpoint.tensor(name, shape)?;
        self.in_dtype(name, &tensor, self.base_dtype(tensor.dtype))
    }

    /// Finds a matrix that is not quantized, in the type in which it is kept.
    ///
    /// # Errors
    /// Whatever is wrong with the tensor.
    pub fn dense(&self, name: &str, shape: &[usize; 2]) -> Result<HostWeight, InferenceError> {
        let tensor = self.checkpoint.tensor(name, shape)?;
        let dtype = self.base_dtype(tensor.dtype);
        let bytes = self.in_dtype(name, &tensor, dtype)?;
        Ok(HostWeight::Dense(DenseWeight { dtype: dense_type(dtype), n_rows: shape[0], n_cols: shape[1], bytes }))
    }

    /// Returns the tensor's own bytes where they fit (no copy of a memory map), else converted ones.
    fn in_dtype(&self, name: &str, tensor: &StoredTensor, dtype: DType) -> Result<SharedBytes, InferenceError> {
        let is_aligned = (tensor.bytes.as_slice().as_ptr() as usize).is_multiple_of(dtype.size_bytes());
        if dtype == tensor.dtype && is_aligned {
            return Ok(tensor.bytes.clone());
        }
        let values = to_f32(tensor.dtype, tensor.bytes.as_slice());
        let bytes = to_dtype(&values, dtype);
        check_range(name, dtype, bytes.as_slice(), &values)?;
        Ok(bytes)
    }

    /// Returns what a norm multiplies by.
    fn norm(&self, name: &str, n: usize, stored_bytes: &mut u64) -> Result<Tensor<2>, InferenceError> {
        let weight = self.row(name, n, stored_bytes)?;
        // Random norms are ones: what to multiply by, not what a file would store.
        let is_whole = matches!(self.checkpoint, Checkpoint::Random { .. });
        Ok(if self.spec.block.norm_unit_offset && !is_whole { weight.add_scalar(1.0) } else { weight })
    }

    fn row(&self, name: &str, n: usize, stored_bytes: &mut u64) -> Result<Tensor<2>, InferenceError> {
        let tensor = self.checkpoint.tensor(name, &[n])?;
        *stored_bytes += (n * self.base_dtype(tensor.dtype).size_bytes()) as u64;
        let values = self.base_values(name, &[n])?;
        Ok(Tensor::from_data(TensorData::new(values, [1, n]), self.device))
    }
}

/// Checks that `values` are finite in `dtype`, as which they are `bytes`.
fn check_range(name: &str, dtype: DType, bytes: &[u8], values: &[f32]) -> Result<(), InferenceError> {
    match first_not_finite(dtype, bytes) {
        None => Ok(()),
        Some((index, _)) => {
            Err(InferenceError::BeyondRange { tensor: name.to_owned(), dtype, index, value: values[index] })
        }
    }
}

/// A matrix that a device takes from its file piece by piece.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub struct UnreadWeight {
    pub name: String,
    pub tensor: StoredTensor,
    /// What values are rounded to first.
    pub base: DType,
    pub scheme: Option<SchemeSpec>,
}

#[cfg(any(feature = "cuda", feature = "wgpu"))]
impl UnreadWeight {
    /// Checks values from byte `at` of the tensor on.
    ///
    /// # Errors
    /// `NotFinite`; `BeyondRange` where the base type does not reach as far.
    pub fn check(&self, at: usize, bytes: &[u8]) -> Result<(), InferenceError> {
        let StoredTensor { dtype, path, .. } = &self.tensor;
        let Some((index, value)) = first_beyond(*dtype, self.base, bytes) else { return Ok(()) };
        let index = at / dtype.size_bytes() + index;
        if value.is_finite() {
            let (tensor, dtype) = (self.name.clone(), self.base);
            return Err(InferenceError::BeyondRange { tensor, dtype, index, value });
        }
        Err(InferenceError::NotFinite { path: path.clone(), tensor: self.name.clone(), index, value })
    }

    /// Returns the error of bytes that could not be read.
    pub fn unreadable(&self, error: &std::io::Error) -> InferenceError {
        self.tensor.unreadable(&self.name, error)
    }
}

/// Packs a matrix with a scheme.
///
/// # Errors
/// `Quantize`, naming the module.
pub fn pack(
    module: &str,
    spec: &SchemeSpec,
    values: &[f32],
    n_out: usize,
    n_in: usize,
) -> Result<HostWeight, InferenceError> {
    schemes::scheme(&spec.scheme)
        .and_then(|scheme| scheme.pack(&scheme.normalize(spec)?, values, n_out, n_in))
        .map(HostWeight::Packed)
        .map_err(|error| InferenceError::Quantize { module: module.to_owned(), reason: error.to_string() })
}

/// Returns the compute dtype that a recipe asks for: the quantization config's, the recipe's own, or f32.
pub fn compute_dtype(recipe: &ModelRecipe) -> DType {
    let from_config = recipe.quantization.as_ref().and_then(|config: &QuantizationConfig| config.compute_dtype);
    from_config.or(recipe.compute_dtype).unwrap_or(DType::F32)
}

/// Returns true where a recipe says what its weights are multiplied in.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub fn has_compute_dtype(recipe: &ModelRecipe) -> bool {
    recipe.compute_dtype.is_some() || recipe.quantization.as_ref().is_some_and(|config| config.compute_dtype.is_some())
}
