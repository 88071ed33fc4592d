//! A model's weights on the GPU for the general path: each linear a matrix of its own, quantized on the device from its file's bytes
//! where the device can, multiplied by the extension of burn's cubecl backend.

use super::rows::device_error;
use super::weights::Loading;
use crate::engine::placing::Placing;
use crate::engine::weights::{WeightReader, compute_dtype};
use crate::event::Progress;
use crate::inference::InferenceError;
use crate::units::DType;
use cubecl::client::Client;
use labpipe_kernels::burn_ext::{DeviceWeight, LargeProducts, StoredWeight};
use labpipe_kernels::cube::DeviceMatrix;
use labpipe_kernels::weight::HostWeight;
use std::sync::Arc;

/// Places matrices on a device of burn's cubecl backend.
pub struct OnDevice<'a> {
    device: cubecl::Device,
    loading: Loading<'a>,
    large: Arc<LargeProducts>,
    /// The model computes in halves.
    is_half: bool,
}

impl<'a> OnDevice<'a> {
    pub fn new(
        device: &cubecl::Device,
        client: &'a Client,
        reader: &'a WeightReader<'a>,
        large: Arc<LargeProducts>,
        progress: &'a dyn Progress,
    ) -> OnDevice<'a> {
        let is_half = compute_dtype(reader.recipe) != DType::F32;
        OnDevice { device: device.clone(), loading: Loading::new(client, reader, progress), large, is_half }
    }

    fn placed(&self, matrix: DeviceMatrix, outlier_threshold: Option<f32>) -> StoredWeight {
        let large = Arc::clone(&self.large);
        let weight = DeviceWeight::new(matrix, self.device.clone(), outlier_threshold, large);
        StoredWeight::Device(weight.rounding_few_rows(self.is_half))
    }

    /// Copies what the host made.
    fn by_host(&self, module: &str, weight: &HostWeight) -> Result<StoredWeight, InferenceError> {
        let (matrix, threshold) = match weight {
            HostWeight::Packed(packed) => {
                (DeviceMatrix::upload_packed(self.loading.client, packed), packed.spec.outlier_threshold)
            }
            HostWeight::Dense(_) => (DeviceMatrix::upload(self.loading.client, weight), None),
        };
        let matrix = matrix.map_err(|error| InferenceError::Quantize {
            module: module.to_owned(),
            reason: format!("no GPU kernel: {error}; run it on the CPU (--device cpu)"),
        })?;
        Ok(self.placed(matrix, threshold))
    }
}

impl Placing for OnDevice<'_> {
    fn embedding(&mut self, reader: &WeightReader<'_>) -> Result<StoredWeight, InferenceError> {
        let matrix = self.loading.matrix("embed_tokens", &[reader.unread_embedding()?])?;
        Ok(self.placed(matrix, None))
    }

    fn linear(
        &mut self,
        reader: &WeightReader<'_>,
        module: &str,
        n_out: usize,
        n_in: usize,
    ) -> Result<StoredWeight, InferenceError> {
        if let Some(mut unread) = reader.unread_weight(module, &[n_out, n_in])? {
            // The codes of LLM.int8() are INT8's: the threshold is its products'.
            let threshold = unread.scheme.as_mut().and_then(|scheme| scheme.outlier_threshold.take());
            if let Some(matrix) = self.loading.by_device(module, &unread)? {
                return Ok(self.placed(matrix, threshold));
            }
        }
        let weight = reader.module_weight(module, n_out, n_in)?;
        self.by_host(module, &weight)
    }

    fn turn(&mut self) -> Result<(), InferenceError> {
        self.loading.loader.turn().map_err(device_error)
    }

    fn settle(&mut self) -> Result<(), InferenceError> {
        self.loading.loader.settle().map_err(device_error)
    }
}
