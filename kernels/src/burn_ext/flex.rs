//! The extension on burn's Flex backend: the host kernels over a Flex tensor's own memory.

use super::host::linear_into;
use super::{StoredLinear, StoredWeight};
use crate::weight::HostWeight;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape, TensorData};
use burn_flex::{Flex, FlexTensor};
use half::{bf16, f16};
use std::sync::Arc;

/// Returns the bytes of a weight that lies where the tensor does: `check_place` was asked.
fn host(weight: &StoredWeight) -> &HostWeight {
    weight.as_host().expect("the weight of a tensor on the host is on the host")
}

impl StoredLinear for Flex {
    fn stored_linear(x: FloatTensor<Self>, weight: Arc<StoredWeight>) -> FloatTensor<Self> {
        let weight = host(&weight);
        let x: FlexTensor = x.to_contiguous();
        let n_tokens = x.layout().shape()[0];
        let n_in = x.layout().shape()[1];
        assert_eq!(n_in, weight.n_cols(), "stored_linear: x has {n_in} columns, the weight {}", weight.n_cols());
        let shape = Shape::new([n_tokens, weight.n_rows()]);
        let mut out = vec![0.0f32; n_tokens * weight.n_rows()];
        let start = x.layout().start_offset();
        match x.dtype() {
            DType::F32 => {
                let values = &x.storage::<f32>()[start..start + n_tokens * n_in];
                linear_into(weight, values, n_tokens, &mut out);
                FlexTensor::from_data(TensorData::new(out, shape))
            }
            DType::F16 => {
                let values: Vec<f32> =
                    x.storage::<f16>()[start..start + n_tokens * n_in].iter().map(|v| v.to_f32()).collect();
                linear_into(weight, &values, n_tokens, &mut out);
                let rounded: Vec<f16> = out.iter().map(|&v| f16::from_f32(v)).collect();
                FlexTensor::from_data(TensorData::new(rounded, shape))
            }
            DType::BF16 => {
                let values: Vec<f32> =
                    x.storage::<bf16>()[start..start + n_tokens * n_in].iter().map(|v| v.to_f32()).collect();
                linear_into(weight, &values, n_tokens, &mut out);
                let rounded: Vec<bf16> = out.iter().map(|&v| bf16::from_f32(v)).collect();
                FlexTensor::from_data(TensorData::new(rounded, shape))
            }
            other => panic!("stored_linear: activations of type {other:?} are not supported"),
        }
    }

    fn stored_rows(ids: IntTensor<Self>, weight: Arc<StoredWeight>) -> FloatTensor<Self> {
        let weight = host(&weight);
        let ids: FlexTensor = ids.to_contiguous();
        let (n, start) = (ids.layout().shape()[0], ids.layout().start_offset());
        let at = start..start + n;
        let rows: Vec<usize> = match ids.dtype() {
            DType::I64 => ids.storage::<i64>()[at].iter().map(|id| *id as usize).collect(),
            DType::I32 => ids.storage::<i32>()[at].iter().map(|id| *id as usize).collect(),
            DType::U32 => ids.storage::<u32>()[at].iter().map(|id| *id as usize).collect(),
            other => panic!("stored_rows: ids of type {other:?} are not supported"),
        };
        let mut values = vec![0.0f32; n * weight.n_cols()];
        for (row, out) in rows.into_iter().zip(values.chunks_exact_mut(weight.n_cols())) {
            weight.unpack_rows(row, out);
        }
        FlexTensor::from_data(TensorData::new(values, Shape::new([n, weight.n_cols()])))
    }

    fn exact_matmul(lhs: FloatTensor<Self>, rhs: FloatTensor<Self>) -> FloatTensor<Self> {
        Flex::float_matmul(lhs, rhs)
    }
}
