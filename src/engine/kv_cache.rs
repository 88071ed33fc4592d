//! The key-value cache: one tensor a layer for keys and one for values, of a fixed capacity. Decoding on the host takes their memory
//! as plain vectors and leaves it so until the next prefill; there is never a second copy.

use super::score::values as plain;
use crate::inference::InferenceError;
use crate::units::DType;
use burn::tensor::{Device, FloatDType, IndexingUpdateOp, Int, Tensor, TensorData};

/// Keys and values of one layer as plain values.
#[derive(Debug)]
pub struct HostLayer {
    pub keys: Vec<f32>,   // [capacity, n_kv_heads * head_dim]
    pub values: Vec<f32>, // [capacity, n_kv_heads * head_dim]
}

/// Keys and values of the tokens seen so far. All layers lie in one of the two forms; the other list is empty.
#[derive(Debug)]
pub struct KvCache {
    /// Keys and values, each `[capacity, n_kv_heads * head_dim]`; taken out only while they are written to.
    layers: Vec<[Option<Tensor<2>>; 2]>,
    host_layers: Vec<HostLayer>,
    capacity: usize,
    n_tokens: usize,
    width: usize,
    dtype: DType,
}

const WRITTEN: &str = "a tensor that was taken out to be written to was put back";

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
        let layers = (0..n_layers).map(|_| [Some(empty()), Some(empty())]).collect();
        KvCache { layers, host_layers: Vec::new(), capacity, n_tokens: 0, width, dtype }
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Number of tokens the cache holds.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Forgets all tokens; layers become tensors again.
    pub fn clear(&mut self, device: &Device) {
        self.n_tokens = 0;
        let shape = [self.capacity, self.width];
        let tensor = |values| Tensor::from_data(TensorData::new(values, shape), device);
        let layers =
            self.host_layers.drain(..).map(|layer| [layer.keys, layer.values].map(|values| Some(tensor(values))));
        self.layers.extend(layers);
    }

    /// Returns the layers as plain values of f32, the memory of their tensors; [`append`](Self::append) is not for them until the
    /// cache is cleared.
    ///
    /// # Errors
    /// `NotFiniteResult` where a tensor can't be read as f32.
    pub fn host_layers(&mut self) -> Result<&mut [HostLayer], InferenceError> {
        for layer in self.layers.drain(..) {
            let [keys, values] = layer.map(|tensor| tensor.expect(WRITTEN));
            self.host_layers.push(HostLayer { keys: plain(keys)?, values: plain(values)? });
        }
        Ok(&mut self.host_layers)
    }

    /// Counts tokens whose keys and values every layer has appended.
    pub fn advance(&mut self, n: usize) {
        self.n_tokens += n;
    }

    /// Bytes allocated.
    pub fn n_bytes(&self) -> u64 {
        (2 * (self.layers.len() + self.host_layers.len()) * self.capacity * self.width * self.dtype.size_bytes()) as u64
    }

    /// Writes keys and values of new tokens behind those the cache holds and returns all of them.
    ///
    /// # Shapes
    /// `k`, `v` `[n, width]`; result twice `[n_tokens + n, width]`, views of the cache.
    ///
    /// With a `position` on the device the one new token goes there, and all of the cache is returned: `[capacity, width]`.
    pub fn append(
        &mut self,
        layer_idx: usize,
        k: Tensor<2>,
        v: Tensor<2>,
        position: Option<&Tensor<1, Int>>,
    ) -> (Tensor<2>, Tensor<2>) {
        let n = k.dims()[0];
        let range = self.n_tokens..self.n_tokens + n;
        let dtype = self.dtype;
        let [keys, values] = &mut self.layers[layer_idx];
        // The cache's tensors are owned alone at this point, so that the assignment writes in place.
        let write = |slot: &mut Option<Tensor<2>>, new: Tensor<2>| {
            let (owned, new) = (slot.take().expect(WRITTEN), new.cast(float_dtype(dtype)));
            if let Some(position) = position {
                let written = owned.select_assign(0, position.clone(), new, IndexingUpdateOp::Assign);
                return slot.insert(written).clone();
            }
            let written = slot.insert(owned.slice_assign([range.clone(), 0..self.width], new));
            written.clone().slice([0..range.end, 0..self.width])
        };
        (write(keys, k), write(values, v))
    }
}
