//! Operations over whole rows that have a kernel on burn's cubecl backend: what burn's own operations take many launches for. Other
//! backends have none; callers ask by device.

use super::cube::{element, empty_like, float_type};
use crate::cube::{self, LayerCache, ops::Heads};
use burn::backend::ops::{FloatTensorOps, IntTensorOps};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Cube, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{DType, Int, IntDType, Shape, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;

/// What attention is, its sizes apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    /// What scores are multiplied by.
    pub scale: f32,
    /// Scores go through `cap · tanh(score / cap)`.
    pub soft_cap: Option<f32>,
    /// Keys that a query sees, its own among them; all where there is none.
    pub window: Option<usize>,
}

/// Operations over rows.
#[backend_extension(Cube: cfg(feature = "burn-cube"))]
pub trait RowOps: Backend {
    /// Returns each row divided by its root mean square, times a row of weights, computed in f32.
    ///
    /// # Shapes
    /// `x` and result `[n, width]`, `weight` `[1, width]` f32.
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self>;

    /// Rotates each head (rotate-half); values beyond `rotary_dim` stay as they are.
    ///
    /// # Shapes
    /// `x` and result `[n, n_heads · head_dim]`; `cos`, `sin` `[n, 1, rotary_dim]` f32, the sines negated in their first half.
    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        head_dim: usize,
    ) -> FloatTensor<Self>;

    /// Returns each row's argmax, the first of equal values.
    ///
    /// # Shapes
    /// `x` `[n, width]` f32, result `[n]`.
    fn row_argmax(x: FloatTensor<Self>) -> IntTensor<Self>;

    /// Returns causal attention of queries whose first one is at `position`, summed in f32, in the type of `q`.
    ///
    /// # Shapes
    /// `q` and result `[n, n_heads · head_dim]`; `k`, `v` `[n_keys, n_kv_heads · head_dim]`; `position` `[1]`.
    fn attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        position: IntTensor<Self>,
        attention: Attention,
    ) -> FloatTensor<Self>;
}

impl RowOps for Cube {
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        let (x, weight) = (into_contiguous(x), into_contiguous(weight));
        let (n, n_cols) = (x.shape()[0], x.shape()[1]);
        let out = empty_like(&x, [n, n_cols], x.dtype);
        let buffers = [&x.handle, &weight.handle, &out.handle];
        cube::rms_norm(&x.client, element(x.dtype), buffers, [n, n_cols], eps);
        out
    }

    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        head_dim: usize,
    ) -> FloatTensor<Self> {
        let (x, cos, sin) = (into_contiguous(x), into_contiguous(cos), into_contiguous(sin));
        let (n, width, rotary_dim) = (x.shape()[0], x.shape()[1], cos.shape()[2]);
        let out = empty_like(&x, [n, width], x.dtype);
        let buffers = [&x.handle, &cos.handle, &sin.handle, &out.handle];
        cube::rotate(&x.client, element(x.dtype), buffers, [n, width], [head_dim, rotary_dim]);
        out
    }

    fn row_argmax(x: FloatTensor<Self>) -> IntTensor<Self> {
        let x = into_contiguous(x);
        let (n, n_cols) = (x.shape()[0], x.shape()[1]);
        let out = empty_device_contiguous_dtype(x.client.clone(), x.device.clone(), Shape::new([n]), DType::U32);
        cube::argmax(&x.client, [&x.handle, &out.handle], [n, n_cols]);
        Cube::int_cast(out, IntDType::I32)
    }

    fn attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        position: IntTensor<Self>,
        attention: Attention,
    ) -> FloatTensor<Self> {
        let Attention { n_heads, n_kv_heads, head_dim, scale, soft_cap, window } = attention;
        let n_keys = k.shape()[0];
        // The kernels read a head's keys one after the other.
        let by_head = |x: FloatTensor<Self>| {
            let x = Cube::float_reshape(x, [n_keys, n_kv_heads, head_dim].into());
            into_contiguous(Cube::float_permute(x, &[1, 0, 2]))
        };
        let (dtype, stored) = (q.dtype, k.dtype);
        let (q, k, v) = (into_contiguous(q), by_head(k), by_head(v));
        let state = into_contiguous(Cube::int_cast(position, IntDType::U32));
        let n = q.shape()[0];
        let layer = LayerCache {
            element: element(k.dtype),
            keys: &k.handle,
            values: &v.handle,
            capacity: n_keys,
            rope: &state.handle,
            qk_norm: None,
            eps: 0.0,
            heads: Heads {
                n_heads: n_heads as u32,
                n_kv_heads: n_kv_heads as u32,
                head_dim: head_dim as u32,
                qk_norm: false,
                rotary_dim: head_dim as u32,
            },
            window: window.map_or(u32::MAX, |window| window as u32),
            scale,
            soft_cap,
        };
        let client = q.client.clone();
        if cube::flash_fits(&client, layer.element, &layer) {
            // Tensor cores take queries as keys are stored.
            let q = into_contiguous(Cube::float_cast(q, float_type(stored)));
            let out = empty_like(&q, [n, n_heads * head_dim], stored);
            cube::flash_attention(&client, layer.element, &layer, &q.handle, &out.handle, &state.handle, n);
            return Cube::float_cast(out, float_type(dtype));
        }
        let out = empty_like(&q, [n, n_heads * head_dim], dtype);
        cube::attention(&client, element(dtype), &layer, &q.handle, &out.handle, &state.handle, n);
        out
    }
}

/// Returns each row divided by its root mean square, times a row of weights (see [`RowOps::rms_norm`]).
///
/// # Shapes
/// `x` and result `[n, width]`, `weight` `[1, width]` f32.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<2>, eps: f32) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::rms_norm(x.into_dispatch(), weight.into_dispatch(), eps))
}

/// Rotates each head (see [`RowOps::rotate`]).
///
/// # Shapes
/// `x` and result `[n, n_heads · head_dim]`; `cos`, `sin` `[n, 1, rotary_dim]` f32.
pub fn rotate(x: Tensor<2>, cos: Tensor<3>, sin: Tensor<3>, head_dim: usize) -> Tensor<2> {
    let [x, cos, sin] = [x.into_dispatch(), cos.into_dispatch(), sin.into_dispatch()];
    Tensor::from_dispatch(Dispatch::rotate(x, cos, sin, head_dim))
}

/// Returns each row's argmax (see [`RowOps::row_argmax`]).
///
/// # Shapes
/// `x` `[n, width]` f32, result `[n]`.
pub fn argmax(x: Tensor<2>) -> Tensor<1, Int> {
    Tensor::from_dispatch(Dispatch::row_argmax(x.into_dispatch()))
}

/// Returns causal attention (see [`RowOps::attention`]).
///
/// # Shapes
/// `q` and result `[n, n_heads · head_dim]`; `k`, `v` `[n_keys, n_kv_heads · head_dim]`; `position` `[1]`.
pub fn attention(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    position: Tensor<1, Int>,
    attention: Attention,
) -> Tensor<2> {
    let [q, k, v] = [q.into_dispatch(), k.into_dispatch(), v.into_dispatch()];
    Tensor::from_dispatch(Dispatch::attention(q, k, v, position.into_dispatch(), attention))
}
