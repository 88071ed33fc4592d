//! The key-value cache: one tensor a layer for keys and one for values, of a fixed capacity.

use crate::units::DType;
use burn::tensor::{Device, FloatDType, Tensor};

/// Keys and values of the tokens seen so far.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<(Tensor<2>, Tensor<2>)>, // each [capacity, n_kv_heads * head_dim]
    capacity: usize,
    n_tokens: usize,
    width: usize,
    dtype: DType,
}

/// Returns burn's name for an element type.
pub fn float_dtype(dtype: DType) -> FloatDType {
    match dtype {
        DType::F32 => FloatDType::F32,
        DType::F16 => FloatDType::F16,
        DType::Bf16 => FloatDType::BF16,
    }
}

impl KvCache {
    /// Allocates room for `capacity` tokens of `width` = n_kv_heads · head_dim values, in every layer.
    pub fn new(n_layers: usize, capacity: usize, width: usize, dtype: DType, device: &Device) -> KvCache {
        let empty = || Tensor::<2>::zeros([capacity, width], device).cast(float_dtype(dtype));
        let layers = (0..n_layers).map(|_| (empty(), empty())).collect();
        KvCache { layers, capacity, n_tokens: 0, width, dtype }
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Number of tokens the cache holds.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    pub fn clear(&mut self) {
        self.n_tokens = 0;
    }

    /// Counts tokens whose keys and values every layer has appended.
    pub fn advance(&mut self, n: usize) {
        self.n_tokens += n;
    }

    /// Bytes allocated.
    pub fn n_bytes(&self) -> u64 {
        (2 * self.layers.len() * self.capacity * self.width * self.dtype.size_bytes()) as u64
    }

    /// Writes keys and values of new tokens behind those the cache holds and returns all of them.
    ///
    /// # Shapes
    /// `k`, `v` `[n, width]`; result twice `[n_tokens + n, width]`, views of the cache.
    pub fn append(&mut self, layer_idx: usize, k: Tensor<2>, v: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        let n = k.dims()[0];
        let range = self.n_tokens..self.n_tokens + n;
        let (keys, values) = &mut self.layers[layer_idx];
        // The cache's tensors are owned alone at this point, so that the assignment writes in place.
        let write = |slot: &mut Tensor<2>, new: Tensor<2>| {
            let device = new.device();
            let owned = std::mem::replace(slot, Tensor::empty([0, 0], &device));
            *slot = owned.slice_assign([range.clone(), 0..self.width], new);
            slot.clone().slice([0..range.end, 0..self.width])
        };
        (write(keys, k), write(values, v))
    }
}
