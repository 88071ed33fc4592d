//! The extension on burn's cubecl backend, which is CUDA and wgpu: the kernels of `crate::cube` over burn's own tensors.

use super::{DeviceWeight, StoredLinear, StoredWeight};
use crate::cube::gemv::{Epilogue, MAX_ROWS};
use crate::cube::{self, DeviceMatrix, Element, Gemv, Kind, Piece, Place, Tuning};
use burn::backend::ops::{FloatTensorOps, IntTensorOps};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Cube, FloatDType, TensorMetadata};
use burn::tensor::{DType, IntDType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::kernel::matmul::init_matmul_output;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::Scalar;
use cubecl::zspace::{metadata::Metadata, strides};
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems, MatmulSetupError};
use cubek::matmul::{multi_level, strategy::Strategy};
use cubek::std::InputBinding;
use std::sync::Arc;

/// Most bytes of a matrix's rows that are decoded at a time on a device, for a product with many rows of x.
pub const DEVICE_PANEL_BYTES: usize = 64 << 20;

/// Panels have a multiple of so many rows: 256 bytes of fp16 results.
const ALIGNED_ROWS: usize = 128;

/// From so many rows of x on, decoding a matrix pays, and its product is one of plain matrices.
const LARGE_ROWS: usize = MAX_ROWS as usize + 1;

/// Returns the matrix that lies where the tensor does: `check_place` was asked.
fn device(weight: &StoredWeight) -> &DeviceWeight {
    match weight {
        StoredWeight::Device(weight) => weight,
        StoredWeight::Host(_) => unreachable!("the weight of a tensor on a device is on that device"),
    }
}

pub(super) fn element(dtype: DType) -> Element {
    match dtype {
        DType::F32 | DType::Flex32 => Element::F32,
        DType::F16 => Element::F16,
        DType::BF16 => Element::Bf16,
        other => panic!("stored_linear: activations of type {other:?} are not supported"),
    }
}

pub(super) fn float_type(dtype: DType) -> FloatDType {
    match element(dtype) {
        Element::F32 => FloatDType::F32,
        Element::F16 => FloatDType::F16,
        Element::Bf16 => FloatDType::BF16,
    }
}

/// Allocates a tensor whose rows lie one after the other.
pub(super) fn empty_like(x: &CubeTensor, shape: [usize; 2], dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(x.client.clone(), x.device.clone(), Shape::new(shape), dtype)
}

impl StoredLinear for Cube {
    fn stored_linear(x: FloatTensor<Self>, weight: Arc<StoredWeight>) -> FloatTensor<Self> {
        let weight = device(&weight);
        let x = into_contiguous(x);
        let shape = x.shape();
        let (m, n_cols) = (shape[0], shape[1]);
        let matrix = weight.matrix();
        assert_eq!(n_cols, matrix.n_cols, "stored_linear: x has {n_cols} columns, the weight {}", matrix.n_cols);
        let element = element(x.dtype);
        if let Some(threshold) = weight.outlier_threshold() {
            let y = empty_like(&x, [m, matrix.n_rows], x.dtype);
            cube::outlier_linear(&x.client, matrix, element, threshold, &x.handle, &y.handle, m);
            return y;
        }
        let may_round = element != Element::F32 || weight.rounds_few_rows();
        if may_round && m <= MAX_ROWS as usize && cube::gemv_fits(&x.client, matrix, m, false) {
            return few_rows(x, matrix, m);
        }
        if m >= LARGE_ROWS {
            return many_rows(x, weight, m);
        }
        let y = empty_like(&x, [m, matrix.n_rows], x.dtype);
        cube::linear(&x.client, matrix, [element; 2], &x.handle, None, &y.handle, Place::whole(matrix), m);
        y
    }

    fn stored_rows(ids: IntTensor<Self>, weight: Arc<StoredWeight>) -> FloatTensor<Self> {
        let matrix = device(&weight).matrix();
        let ids = into_contiguous(Cube::int_cast(ids, IntDType::U32));
        let n = ids.shape()[0];
        let rows = empty_like(&ids, [n, matrix.n_cols], DType::F32);
        cube::embed(&ids.client, matrix, &ids.handle, n, [0, n], 1.0, &rows.handle);
        rows
    }

    fn exact_matmul(lhs: FloatTensor<Self>, rhs: FloatTensor<Self>) -> FloatTensor<Self> {
        if element(lhs.dtype) == Element::F32 { by_units(lhs, rhs, None) } else { Cube::float_matmul(lhs, rhs) }
    }
}

/// Multiplies a few rows on tensor cores straight from the stored form; the kernel takes and gives fp32.
fn few_rows(x: CubeTensor, matrix: &DeviceMatrix, m: usize) -> CubeTensor {
    let dtype = x.dtype;
    let x = into_contiguous(Cube::float_cast(x, FloatDType::F32));
    let y = empty_like(&x, [m, matrix.n_rows], DType::F32);
    let call = Gemv { x: &x.handle, y: &y.handle, m, norm: None, bias: None, epilogue: Epilogue::Store };
    cube::gemv(&x.client, matrix, &call, Tuning::of(matrix));
    Cube::float_cast(y, float_type(dtype))
}

/// Multiplies many rows with a plain matrix: the stored one where it has the type of x, else panels of its decoded rows.
fn many_rows(x: CubeTensor, weight: &DeviceWeight, m: usize) -> CubeTensor {
    let (matrix, element) = (weight.matrix(), element(x.dtype));
    let y = empty_like(&x, [m, matrix.n_rows], x.dtype);
    let is_plain = matches!(
        (matrix.kind, element),
        (Kind::F32, Element::F32) | (Kind::F16, Element::F16) | (Kind::Bf16, Element::Bf16)
    );
    if is_plain {
        return multiply_plain(&x, weight, matrix, y, 0, m);
    }
    let row_bytes = matrix.n_cols * element.size_bytes();
    // Where a panel's columns begin is aligned as every runtime wants it.
    let panel_rows =
        (DEVICE_PANEL_BYTES / row_bytes / ALIGNED_ROWS * ALIGNED_ROWS).max(ALIGNED_ROWS).min(matrix.n_rows);
    let panel = x.client.empty(panel_rows * row_bytes);
    let mut y = y;
    for first in (0..matrix.n_rows).step_by(panel_rows) {
        let rows = first..(first + panel_rows).min(matrix.n_rows);
        let decoded = DeviceMatrix::plain(element, &panel, rows.len(), matrix.n_cols);
        cube::dequantize_piece(&x.client, matrix, element, &Piece::rows(matrix, rows), &panel);
        y = multiply_plain(&x, weight, &decoded, y, first, m);
    }
    y
}

/// Writes columns of y from `first` on: the products of x with a plain matrix of its type.
fn multiply_plain(
    x: &CubeTensor,
    weight: &DeviceWeight,
    matrix: &DeviceMatrix,
    y: CubeTensor,
    first: usize,
    m: usize,
) -> CubeTensor {
    #[cfg(feature = "cuda")]
    {
        use crate::cube::cublas::Operand;
        let element = element(x.dtype);
        let (client, k, y_stride) = (&x.client, matrix.n_cols, y.shape()[1]);
        let is_done = weight.large().by_cublas(|blas| {
            let of = |handle| Operand::of(client, handle, element);
            let (x, w, y) = (of(&x.handle)?, of(&matrix.codes)?, of(&y.handle)?.offset(first));
            blas.matmul(client, x, k, w, y, y_stride, [m, matrix.n_rows, k], false)
        });
        if is_done {
            return y;
        }
    }
    let _ = weight.large();
    // W as the product wants it, [k, n], without moving it.
    let (k, n, device) = (matrix.n_cols, matrix.n_rows, x.device.clone());
    let transposed = Metadata::new(Shape::new([k, n]), strides![1, k]);
    let w = CubeTensor::new(x.client.clone(), matrix.codes.clone(), transposed, device.clone(), x.dtype);
    let y_stride = y.shape()[1];
    let at = y.handle.clone().offset_start((first * element(x.dtype).size_bytes()) as u64);
    let columns = Metadata::new(Shape::new([m, n]), strides![y_stride, 1]);
    let part = CubeTensor::new(x.client.clone(), at, columns, device, x.dtype);
    if element(x.dtype) == Element::F32 {
        by_units(x.clone(), w, Some(part));
    } else {
        by_tensor_cores(x, w, part, [m, n, k]);
    }
    y
}

/// Multiplies matrices of halves on tensor cores. Of burn's products the first that the device and the sizes allow: an H200 prefills
/// 2,048 tokens of Llama-3.2-3B's shape in 85 ms with the first, 115 ms with the second, 189 ms with the one that burn takes by itself.
fn by_tensor_cores(x: &CubeTensor, w: CubeTensor, out: CubeTensor, sizes: [usize; 3]) {
    // Whole tiles: others have not been tried.
    if x.client.name() == "cuda" && sizes.iter().all(|size| size.is_multiple_of(128)) {
        let strategies = [
            multi_level::Strategy::SpecializedTmaMma(Default::default()),
            multi_level::Strategy::OrderedDoubleMma(Default::default()),
        ];
        for strategy in strategies {
            if multiply(&Strategy::MultiLevel(strategy), x.clone(), w.clone(), &out).is_ok() {
                return;
            }
        }
    }
    burn_cubecl::kernel::matmul::matmul(x.clone(), w, Some(out), Default::default(), x.dtype)
        .expect("burn multiplies matrices of any size");
}

/// Multiplies f32 matrices in f32, without tensor cores, which round their values to TF32 first.
fn by_units(lhs: CubeTensor, rhs: CubeTensor, out: Option<CubeTensor>) -> CubeTensor {
    let out = out.unwrap_or_else(|| init_matmul_output(&lhs, &rhs, DType::F32));
    let strategy = Strategy::MultiLevel(multi_level::Strategy::SimpleUnit(Default::default()));
    multiply(&strategy, lhs, rhs, &out).expect("the product that needs no accelerator takes matrices of any size");
    out
}

/// Launches one of burn's products of matrices of one type.
///
/// # Errors
/// Where the device or the sizes do not allow it; nothing is launched then.
fn multiply(strategy: &Strategy, lhs: CubeTensor, rhs: CubeTensor, out: &CubeTensor) -> Result<(), MatmulSetupError> {
    let number = match element(out.dtype) {
        Element::F32 => f32::elem_type_native(),
        Element::F16 => half::f16::elem_type_native(),
        Element::Bf16 => half::bf16::elem_type_native(),
    };
    let mut types = MatmulElems::from_globals(&MatmulGlobalElems { lhs: number, rhs: number, out: number });
    let [lhs, rhs] = [lhs, rhs].map(|tensor| InputBinding::new(tensor.binding(), number));
    let client = out.client.clone();
    cubek::matmul::launch::launch_ref(strategy, &client, lhs, rhs, out.clone().binding(), &mut types)
}
