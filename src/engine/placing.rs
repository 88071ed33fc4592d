//! Where a model's matrices are put when they are read.

use super::weights::WeightReader;
use crate::inference::InferenceError;
use labpipe_kernels::burn_ext::StoredWeight;

/// Puts matrices where a model computes. Its small vectors are tensors on the reader's device.
pub trait Placing {
    /// Places the embedding, `[vocab, hidden]`.
    ///
    /// # Errors
    /// Whatever is wrong with the tensor; what the device refuses.
    fn embedding(&mut self, reader: &WeightReader<'_>) -> Result<StoredWeight, InferenceError>;

    /// Places a linear's weight, `[n_out, n_in]`, packed if the recipe quantizes it.
    ///
    /// # Errors
    /// Whatever is wrong with the tensor or the scheme; what the device refuses.
    fn linear(
        &mut self,
        reader: &WeightReader<'_>,
        module: &str,
        n_out: usize,
        n_in: usize,
    ) -> Result<StoredWeight, InferenceError>;

    /// Ends a block, whose matrices may still be under way.
    ///
    /// # Errors
    /// What the device says of those before.
    fn turn(&mut self) -> Result<(), InferenceError> {
        Ok(())
    }

    /// Waits for all that is under way.
    ///
    /// # Errors
    /// What the device says of it.
    fn settle(&mut self) -> Result<(), InferenceError> {
        Ok(())
    }
}

/// Leaves matrices on the host, those of files in their memory maps.
pub struct OnHost;

impl Placing for OnHost {
    fn embedding(&mut self, reader: &WeightReader<'_>) -> Result<StoredWeight, InferenceError> {
        let shape = [reader.spec.vocab_size, reader.spec.hidden_size];
        reader.dense(reader.embedding_name(), &shape).map(StoredWeight::Host)
    }

    fn linear(
        &mut self,
        reader: &WeightReader<'_>,
        module: &str,
        n_out: usize,
        n_in: usize,
    ) -> Result<StoredWeight, InferenceError> {
        reader.module_weight(module, n_out, n_in).map(StoredWeight::Host)
    }
}
