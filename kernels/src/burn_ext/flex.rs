//! The extension on burn's Flex backend: the host kernels over a Flex tensor's own memory.

use super::StoredLinear;
use super::host::linear_into;
use crate::weight::HostWeight;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Shape, TensorData};
use burn_flex::{Flex, FlexTensor};
use half::{bf16, f16};
use std::sync::Arc;

impl StoredLinear for Flex {
    fn stored_linear(x: FloatTensor<Self>, weight: Arc<HostWeight>) -> FloatTensor<Self> {
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
                linear_into(&weight, values, n_tokens, &mut out);
                FlexTensor::from_data(TensorData::new(out, shape))
            }
            DType::F16 => {
                let values: Vec<f32> =
                    x.storage::<f16>()[start..start + n_tokens * n_in].iter().map(|v| v.to_f32()).collect();
                linear_into(&weight, &values, n_tokens, &mut out);
                let rounded: Vec<f16> = out.iter().map(|&v| f16::from_f32(v)).collect();
                FlexTensor::from_data(TensorData::new(rounded, shape))
            }
            DType::BF16 => {
                let values: Vec<f32> =
                    x.storage::<bf16>()[start..start + n_tokens * n_in].iter().map(|v| v.to_f32()).collect();
                linear_into(&weight, &values, n_tokens, &mut out);
                let rounded: Vec<bf16> = out.iter().map(|&v| bf16::from_f32(v)).collect();
                FlexTensor::from_data(TensorData::new(rounded, shape))
            }
            other => panic!("stored_linear: activations of type {other:?} are not supported"),
        }
    }
}
